"""Everything that a run wrote about itself, read with bounded memory and whatever state the run is in.

A run may be going on, killed in the middle of a line, resumed (later records of a step replace earlier
ones), a million steps long, or without any validation: reading never fails for that, it only says what
was missing. `Series` holds the per-step metrics as at most `MAX_BUCKETS` buckets of consecutive steps
with the mean, the smallest and the largest value of each, so that no spike is lost.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalite.errors import UserError

Floats = NDArray[np.float64]

MAX_BUCKETS = 500
"""Mean, minimum and maximum of this many buckets are drawn: at most 1,500 points a line."""

MAX_MARKS = 1000
"""Places of spikes and skipped steps kept; all of them are counted."""

FIELDS = (
    "step", "tokens", "loss", "grad_norm", "learning_rate", "global_batch_size", "valid_tokens", "skipped",
    "spike", "step_ms", "data_wait_ms", "forward_ms", "backward_ms", "communication_ms", "optimizer_ms",
    "tokens_per_s", "mfu_causal", "mfu_full", "hfu_causal", "peak_memory_bytes", "update_ratio", "weight_norm",
)  # fmt: skip
"""Numbers of one line of ``metrics.jsonl``; an absent one reads as nan."""

_COLUMN = {name: column for column, name in enumerate(FIELDS)}


@dataclass(frozen=True, slots=True)
class Series:
    """Per-step metrics in buckets: arrays [buckets, fields] in the order of `FIELDS`, nan where unknown."""

    mean: Floats
    low: Floats
    high: Floats
    steps: int
    """Steps on record, each counted once however often the run was resumed."""
    skipped: int
    """Steps whose update was skipped."""
    spikes: int
    """Steps marked as a spike."""
    non_finite: int
    """Steps whose loss was nan or infinite."""
    first_loss: float
    """Loss of the first step on record."""
    last_loss: float
    """Loss of the last step on record; nan if it was not finite."""
    marks: tuple[tuple[str, float, float], ...]
    """(kind, step, tokens) of spikes and skipped steps, the first `MAX_MARKS` of them."""

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, name: str) -> Floats:
        """[buckets] means of one field."""
        return self.mean[:, _COLUMN[name]]

    def range(self, name: str) -> tuple[Floats, Floats]:
        """[buckets] smallest and largest value of one field."""
        return self.low[:, _COLUMN[name]], self.high[:, _COLUMN[name]]

    def known(self, name: str) -> bool:
        """Whether any step recorded the field."""
        return bool(np.isfinite(self[name]).any())


@dataclass(slots=True)
class RunRecords:
    """The files of one run directory; absent ones are empty."""

    name: str
    series: Series
    run: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, Any] = field(default_factory=dict)
    overlap: dict[str, Any] = field(default_factory=dict)
    waterfall: dict[str, Any] = field(default_factory=dict)
    """As `megalite.train.waterfall_record.as_record` makes it, if `megalite bench --record` was run."""
    evals: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    config_text: str = ""
    problems: list[str] = field(default_factory=list)
    """What could not be read, one sentence each."""

    @property
    def last_eval(self) -> dict[str, Any]:
        """The last validation over every held-out document, else the last one; empty if none."""
        complete = [record for record in self.evals if record.get("complete")]
        return (complete or self.evals or [{}])[-1]

    @property
    def tokens(self) -> float:
        """Training tokens consumed; nan before the first step."""
        known = self.series["tokens"] if len(self.series) else np.empty(0)
        high = self.series.range("tokens")[1] if known.size else known
        return float(np.nanmax(high)) if np.isfinite(high).any() else math.nan


def read_run(run_dir: str | os.PathLike[str]) -> RunRecords:
    """Read what is there of a run directory.

    Raises:
        UserError: the folder does not exist or holds neither ``metrics.jsonl`` nor ``run.json``.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UserError(f"run directory {str(folder)!r} does not exist: give the folder that pretrain wrote")
    if not any((folder / name).exists() for name in ("metrics.jsonl", "run.json")):
        raise UserError(
            f"{str(folder)!r} is not a run directory: it holds neither metrics.jsonl nor run.json. "
            "Give the folder that pretrain wrote, for example runs/NAME"
        )
    problems: list[str] = []
    run = _read_json(folder / "run.json", problems)
    config = folder / "config.toml"
    return RunRecords(
        name=str(run.get("name") or folder.resolve().name),
        series=read_series(folder / "metrics.jsonl", problems),
        run=run,
        result=_read_json(folder / "result.json", problems, optional=True),
        baselines=_read_json(folder / "baselines.json", problems),
        overlap=_read_json(folder / "overlap.json", problems, optional=True),
        waterfall=_read_json(folder / "waterfall.json", problems, optional=True),
        evals=_latest_by_step(read_lines(folder / "evals.jsonl", problems)),
        events=list(read_lines(folder / "events.jsonl", problems)),
        config_text=config.read_text(encoding="utf-8", errors="replace") if config.exists() else "",
        problems=problems,
    )


def read_lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file; torn or foreign lines are passed over and counted in `problems`."""
    if not path.exists():
        problems.append(f"{path.name} is missing.")
        return
    bad = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                bad += 1
                continue
            if isinstance(record, dict):
                yield record
            else:
                bad += 1
    if bad:
        lines_were = "line was" if bad == 1 else "lines were"
        problems.append(f"{path.name}: {bad} {lines_were} unreadable (an interrupted write) and left out.")


def read_series(path: Path, problems: list[str], max_buckets: int = MAX_BUCKETS) -> Series:
    """Stream ``metrics.jsonl`` into at most `max_buckets` buckets of equally many steps."""
    collector = _Collector(width=max(1, math.ceil(_count_lines(path) / max_buckets)))
    for record in read_lines(path, problems):
        collector.add(record)
    return collector.finish()


class _Collector:
    """Buckets under construction. A step that comes again takes back everything from itself on."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._rows: list[list[float]] = []
        self._buckets: list[tuple[Floats, Floats, Floats, int, int, int, int]] = []
        self._marks: list[tuple[str, float, float]] = []
        self._first_loss = self._last_loss = math.nan
        self._last_step = -math.inf

    def add(self, record: dict[str, Any]) -> None:
        row = [_number(record.get(name)) for name in FIELDS]
        if row[0] <= self._last_step:
            self._rewind(row[0])
        if not self._buckets and not self._rows:
            self._first_loss = row[_COLUMN["loss"]]
        self._last_step, self._last_loss = row[0], row[_COLUMN["loss"]]
        for kind in ("skipped", "spike"):
            if row[_COLUMN[kind]] > 0 and len(self._marks) < MAX_MARKS:
                self._marks.append((kind, row[0], row[_COLUMN["tokens"]]))
        self._rows.append(row)
        if len(self._rows) == self._width:
            self._close()

    def _rewind(self, step: float) -> None:
        """Forget steps from `step` on: the run was resumed from an earlier checkpoint."""
        self._rows = [row for row in self._rows if row[0] < step]
        self._marks = [mark for mark in self._marks if mark[1] < step]
        while self._buckets and self._buckets[-1][1][0] >= step:
            self._buckets.pop()

    def _close(self) -> None:
        rows = np.array(self._rows, dtype=np.float64)
        rows[~np.isfinite(rows)] = np.nan
        count = lambda name: int((rows[:, _COLUMN[name]] > 0).sum())  # noqa: E731
        self._buckets.append(
            (
                *_mean_low_high(rows),
                len(rows),
                count("skipped"),
                count("spike"),
                int(np.isnan(rows[:, _COLUMN["loss"]]).sum()),
            )
        )
        self._rows = []

    def finish(self) -> Series:
        if self._rows:
            self._close()
        shape = (len(self._buckets), len(FIELDS))
        mean = np.array([bucket[0] for bucket in self._buckets]).reshape(shape)
        low = np.array([bucket[1] for bucket in self._buckets]).reshape(shape)
        high = np.array([bucket[2] for bucket in self._buckets]).reshape(shape)
        counts = np.array([bucket[3:] for bucket in self._buckets], dtype=np.int64).reshape(-1, 4)
        steps, skipped, spikes, non_finite = counts.sum(axis=0).tolist()
        return Series(
            mean, low, high, steps, skipped, spikes, non_finite,
            self._first_loss, self._last_loss, tuple(self._marks),
        )  # fmt: skip


def _mean_low_high(rows: Floats) -> tuple[Floats, Floats, Floats]:
    """[fields] mean, minimum and maximum of the known values of `rows` [n, fields]; nan where none is."""
    known = ~np.isnan(rows)
    some = known.any(axis=0)
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(some, np.where(known, rows, 0.0).sum(axis=0) / count, np.nan)
    low = np.where(some, np.where(known, rows, np.inf).min(axis=0), np.nan)
    high = np.where(some, np.where(known, rows, -np.inf).max(axis=0), np.nan)
    return mean, low, high


def _number(value: Any) -> float:
    """A recorded number; nan for anything else."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def si(value: float, digits: int = 3, unit: str = "") -> str:
    """A number with its prefix: 12.3M, 4.1B, 980; 7.08 MFLOP, 4.1 GB with a unit; 1.4e-3 if small."""
    if not math.isfinite(value):
        return "—"
    size = abs(value)
    gap, billion = (" ", "G") if unit else ("", "B")  # counts of tokens are said in billions
    for limit, letter in ((1e12, "T"), (1e9, billion), (1e6, "M"), (1e3, "k")):
        # A number that would round up to the next prefix takes that one: 999,999 is 1M, not 1000k.
        if size >= limit * (1 - 0.5 * 10**-digits):
            return f"{value / limit:.{digits}g}{gap}{letter}{unit}"
    if size >= 1e-2 or size == 0:
        return f"{value:.{digits}g}{gap}{unit}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}{gap}{unit}"


def _count_lines(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _read_json(path: Path, problems: list[str], *, optional: bool = False) -> dict[str, Any]:
    if not path.exists():
        if not optional:
            problems.append(f"{path.name} is missing.")
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        problems.append(f"{path.name} is not valid JSON and was left out.")
        return {}
    return value if isinstance(value, dict) else {}


def _latest_by_step(records: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Validations in the order of their steps; of two at one step the later, more complete one."""
    latest: dict[Any, dict[str, Any]] = {}
    for record in records:
        step = record.get("step", 0)
        if latest.get(step, {}).get("complete") and not record.get("complete"):
            continue
        latest[step] = record
    return [latest[step] for step in sorted(latest)]
