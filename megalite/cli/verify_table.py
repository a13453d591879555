"""What ``megalite verify`` prints: one row for each layout, the first wrong tensor of a failure, and JSON."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from megalite import __version__
from megalite.config import ModelConfig, RunConfig
from megalite.config_values import to_dict

if TYPE_CHECKING:
    from megalite.train.verify import Result, Verification
    from megalite.train.verify_layouts import Layout
    from megalite.train.verify_pool import RankError

MARKS = {
    "equal": ("✓", "green"),
    "wrong": ("✗", "bold red"),
    "failed": ("✗", "bold red"),
    "skipped": ("–", "dim"),
}
_PLAIN = 120
"""Columns where there is no terminal."""
_TRACE_LINES = 6
_WIDE = 104
"""Columns from which names are written in full and rows say their ranks and seconds."""


class Table:
    """Rows that are printed as they come, so their widths are settled beforehand.

    Args:
        console: where to print.
        layouts: all that will come.
        dtypes: float64, and the run's type if it is checked.
        quiet: print nothing.
    """

    def __init__(
        self, console: Console, layouts: Sequence[Layout], dtypes: Sequence[str], *, quiet: bool = False
    ) -> None:
        self.console = console
        self.dtypes = dtypes
        self.quiet = quiet
        self._reason = ""
        self.width = console.width if console.is_terminal or "COLUMNS" in os.environ else _PLAIN
        self.wide = self.width >= _WIDE
        self.errors = 9 if self.wide else 8
        extra = [("update", self.errors), *((dtype, max(8, len(dtype) + 1)) for dtype in dtypes[1:])]
        numbers = 10 if self.wide else 7
        self.columns = [("ranks", 6)] if self.wide else []
        self.columns += [
            ("loss", numbers),
            ("norm", numbers),
            ("gradient" if self.wide else "grad", self.errors),
        ]
        self.tail = [*extra, *([("s", 5)] if self.wide else [])]
        fixed = 2 + sum(width for _, width in [*self.columns, *self.tail])
        longest = max((len(layout.name) for layout in layouts), default=0)
        free = self.width - fixed - 2
        self.name = min(max(longest, 11), free - (32 if self.wide else 15))
        self.worst = min(free - self.name, 34)

    def say(self, text: Text | str = "", style: str = "") -> None:
        """One line, never wrapped by rich."""
        if not self.quiet:
            self.console.print(text, style=style, markup=False, soft_wrap=True)

    def header(self, config: RunConfig, small: ModelConfig, world: int, device: str) -> None:
        """What is compared, and the columns."""
        from megalite.train.verify_model import TOKENS, describe

        given = config.model
        where = f"up to {world} processes on this CPU (gloo)" if device == "cpu" else f"{world} GPUs (nccl)"
        shared = f" over {small.kv_heads} key heads" if small.kv_heads < small.num_attention_heads else ""
        layers = f"{small.num_layers} layers (pipelines: one more than stages)"
        sizes = f"{given.num_layers} layers of width {given.hidden_size}"
        self._fact("model", f"{config.preset or 'as configured'}: {describe(given)}; {sizes}")
        self._fact(
            "shrunk",
            f"{small.num_attention_heads} heads{shared}, width {small.hidden_size}, vocabulary {small.vocab_size}, "
            f"{layers}",
        )
        self._fact("data", f"packed documents, {TOKENS} tokens a micro-batch, unequal masks; 3 steps of SGD")
        self._fact("where", f"{where}, each layout against one process without a group")
        cells = Text("  " + "layout".ljust(self.name))
        for title, width in self.columns:
            cells.append(title.rjust(width))
        cells.append("  " + "in".ljust(self.worst))
        for title, width in self.tail:
            cells.append(title.rjust(width))
        self.say()
        self.say(cells, "bold")

    def _fact(self, name: str, text: str) -> None:
        lines = _fold(text, self.width - 9)
        self.say(Text.assemble((f"{name:<8} ", "dim"), lines[0]))
        for line in lines[1:]:
            self.say(" " * 9 + line)

    def row(self, result: Result) -> None:
        """One layout; what is wrong with it follows on lines of its own."""
        mark, style = MARKS[result.status]
        name = result.layout.name
        line = Text.assemble((mark, style), " ", name.ljust(self.name))
        if result.checks and len(name) > self.name:
            self.say(line)
            line = Text(" " * (self.name + 2))
        if result.checks:
            self._numbers(line, result)
            self.say(line)
        elif result.status == "skipped":
            reason = "as above" if result.reason == self._reason else result.reason
            self._reason = result.reason
            for text in _fold(reason, self.width - self.name - 4):
                self.say(line.append(f"  {text}", "dim"))
                line = Text(" " * (self.name + 2))
        else:
            self.say(line)
        self._details(result)

    def _numbers(self, line: Text, result: Result) -> None:
        check = result.checks[self.dtypes[0]]
        worst, limit = check.worst("gradient")
        values = [str(result.layout.world)] if self.wide else []
        digits = 6 if self.wide else 4
        values += [f"{check.value(kind):.{digits}f}" for kind in ("loss", "grad norm")]
        wrong = {measure.kind for measure in check.wrong}
        for value, (title, width) in zip(values, self.columns, strict=False):
            kind = {"loss": "loss", "norm": "grad norm"}.get(title)
            line.append(value.rjust(width), "bold red" if kind in wrong else "")
        line.append(_error(worst.relative).rjust(self.errors), _style(worst.error <= limit))
        line.append("  " + shorten(worst.name, self.worst).ljust(self.worst), "dim")
        update, limit = check.worst("update")
        line.append(_error(update.relative).rjust(self.errors), _style(update.error <= limit))
        for dtype in self.dtypes[1:]:
            if dtype in result.checks:
                worst, limit = result.checks[dtype].worst("gradient")
                line.append(_error(worst.relative).rjust(8), _style(worst.error <= limit))
            else:
                line.append(" " * 8)
        if self.wide:
            line.append(f"{result.seconds:5.1f}", "dim")

    def _details(self, result: Result) -> None:
        if result.finding is not None:
            for text in result.finding.lines():
                self._wrapped(text, "red")
        said: dict[str, list[int]] = {}
        for error in result.errors:
            said.setdefault(f"{error.kind}: {error.summary}", []).append(error.rank)
        for text, ranks in said.items():
            self._wrapped(f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} {text}", "red")
        for text in _place(result.errors[0]) if result.errors else []:
            self.say("      " + text[: self.width - 6], "dim")

    def _wrapped(self, text: str, style: str) -> None:
        for place, line in enumerate(_fold(text, self.width - 6)):
            self.say(("    " if place == 0 else "      ") + line, style)

    def summary(self, results: Sequence[Result], seconds: float) -> None:
        """The limits, and how many layouts kept them."""
        counts = {status: sum(r.status == status for r in results[1:]) for status in MARKS}
        limits = "errors are shares of the model's largest gradient (or update); limits: float64 1e-10"
        for dtype in self.dtypes[1:]:
            limits += f", {dtype} {limit_in_words(dtype)}"
        self.say()
        for line in _fold(limits, self.width):
            self.say(line, "dim")
        good = not counts["wrong"] and not counts["failed"] and results[0].status == "equal"
        words = [f"{counts['equal']} layouts equal one process"]
        words += [f"{counts[status]} {status}" for status in ("wrong", "failed", "skipped") if counts[status]]
        if results[0].status != "equal":
            words.append("one process differs from the plain loop")
        self.say(f"{', '.join(words)}; {seconds:.0f} s", "bold green" if good else "bold red")


def limit_in_words(dtype: str) -> str:
    """How large an error may be in the run's type."""
    from megalite.train.verify_compare import FLOORS, TIMES

    return f"{TIMES:g} x the error of one process in it, at least {FLOORS[dtype]:.0e}"


def shorten(name: str, width: int) -> str:
    """``layers.1.attention.q_proj.weight`` → ``1.q_proj`` where there is no room for the whole name."""
    if len(name) <= width:
        return name
    short = re.sub(r"^layers\.(\d+)\.(?:\w+\.)*?(\w+)\.(weight|bias)$", r"\1.\2.\3", name).removesuffix(
        ".weight"
    )
    return short if len(short) <= width else "…" + short[len(short) - width + 1 :]


def _place(error: RankError) -> list[str]:
    """The innermost lines of a traceback, which ends with them, or of a stack, which begins with them."""
    lines = [line.rstrip() for line in error.details.rstrip().splitlines()]
    if error.kind != "hung":
        return lines[-_TRACE_LINES:]
    current = [i for i, line in enumerate(lines) if line.startswith("Current thread")]
    return lines[current[0] + 1 if current else 0 :][:_TRACE_LINES]


def _error(value: float) -> str:
    return "0" if value == 0 else "differs" if math.isinf(value) else f"{value:.1e}"


def _style(good: bool) -> str:
    return "green" if good else "bold red"


def _fold(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken between words."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def as_json(
    config: RunConfig, verification: Verification, results: Sequence[Result], seconds: float
) -> dict[str, Any]:
    """Everything for machines; numbers that are not finite are null."""
    from megalite.train.verify_compare import EXACT, FLOORS, TIMES

    counts = {status: sum(r.status == status for r in results) for status in MARKS}
    return {
        "megalite": __version__,
        "equal": counts["wrong"] == counts["failed"] == 0,
        "counts": counts,
        "seconds": round(seconds, 3),
        "preset": config.preset,
        "model": to_dict(config.model),
        "shrunk": to_dict(verification.small),
        "limits": {
            "float64": {"of_largest": EXACT},
            **{d: {"of_largest": FLOORS[d], "times_one_process": TIMES} for d in verification.dtypes[1:]},
        },
        "layouts": [_layout_json(result) for result in results],
    }


def _layout_json(result: Result) -> dict[str, Any]:
    layout, finding = result.layout, result.finding
    found: dict[str, Any] = {
        "name": layout.name,
        "group": layout.group,
        "processes": layout.world,
        "status": result.status,
        "reason": result.reason,
        "seconds": round(result.seconds, 3),
        "parallel": to_dict(layout.parallel),
        "recompute": to_dict(layout.recompute),
        "checks": {dtype: _check_json(check) for dtype, check in result.checks.items()},
        "first_wrong": None,
        "errors": [{"rank": e.rank, "kind": e.kind, "summary": e.summary} for e in result.errors],
    }
    if finding is not None:
        values = {name: getattr(finding, name) for name in finding.__slots__}
        found["first_wrong"] = {
            name: _finite(value) if isinstance(value, float) else value for name, value in values.items()
        }
    return found


def _check_json(check: Any) -> dict[str, Any]:
    def worst(kind: str) -> dict[str, Any]:
        measure, limit = check.worst(kind)
        return {
            "name": measure.name,
            "error": _finite(measure.error),
            "limit": _finite(limit),
            "of_largest": _finite(measure.relative),
        }

    return {
        "loss": _finite(check.value("loss")),
        "grad_norm": _finite(check.value("grad norm")),
        "wrong": len(check.wrong),
        "worst": {kind: worst(kind) for kind in ("token losses", "loss", "gradient", "grad norm", "update")},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
