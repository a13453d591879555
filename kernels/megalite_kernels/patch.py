"""Put the fused ops into a model of any codebase, in place, checked and reversible.

    import megalite_kernels

    report = megalite_kernels.patch(model)     # Hugging Face, nanoGPT-style, plain torch modules
    print(report)                              # what was replaced, how far apart old and new are, what was skipped
    ...                                        # train, generate, save: all as before
    megalite_kernels.unpatch(model)            # the model as it was

    with megalite_kernels.patched(model):      # or for a while
        ...

What happens to a module: its `__class__` becomes a subclass of the same name whose forward runs on the fused ops.
Parameters, buffers, state_dict keys, hooks, device, dtype and training mode are not touched, nor is any class, module
file or other instance; deepcopy and pickle keep the change, `save_pretrained` and `state_dict` do not see it. Modules
are recognised by what they compute and not by the name of an architecture, and each is compared with the original on
random input, forward and gradients, before it is kept (`patching.check` states the tolerance).

Calls that a fused op can't do go to the original code, call by call: attention with a padding mask (of any kind but
causal and sliding window), with dropout while training, or when attention weights are asked for. While
`torch.compile` traces, a mask's values can't be read, so attention is fused there only if the model passes no mask
(Hugging Face: the "sdpa" implementation without padding).

Projections (torch's Linear, GPT-2's Conv1D, not what is derived from them) are replaced on CPUs only, where the native
library's rate, as measured for the CPU's instruction set and the dtype, is above torch's for one of the three products
of a step. Each call then decides by its own sizes; under autocast it is the original.

The loss: a model whose forward takes `labels` or `targets` gets it from `linear_cross_entropy` while it trains, without
making logits. `output.logits` is then a `LazyLogits`, which computes them when it is used. In eval mode, and without
targets, logits are tensors as before.

Differences that remain: a mean loss over no token at all is 0 where torch gives NaN; there are first derivatives only,
and no `torch.func` transforms (the ops' gradients are autograd functions); code that looks for a class itself and not
for what is derived from it (`quantize_dynamic`) does not find a patched module, so it comes before; torch's
`FlopCounterMode` does not count the ops; `nn.DataParallel` can't gather `LazyLogits` (DistributedDataParallel has
nothing to gather).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from megalite_kernels.patching import attention_rules, check, linear, loss, mlp, norms, swap
from megalite_kernels.patching.common import Proposal
from megalite_kernels.patching.swap import Spec

KINDS = (
    "rms_norm",
    "layer_norm",
    "swiglu",
    "geglu",
    "gelu",
    "relu_squared",
    "rope",
    "attention",
    "linear",
    "linear_cross_entropy",
)
"""Ops that `patch` can put in place."""

RULES: tuple[Callable[[nn.Module], Proposal | None], ...] = (
    attention_rules.propose_rope,
    attention_rules.propose_attention,
    mlp.propose_mlp,
    norms.propose,
    linear.propose,
)


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one module."""

    module: str
    """Its name in the model."""
    old: str
    """Its class."""
    new: str
    """The op; what it would have been, where it was skipped."""
    error: float | None
    """Largest difference found by the check, in the model's dtype, as a share of the largest value."""
    skipped: str = ""
    """Why it was left as it was."""
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What `patch` did; prints as a table, layers that differ only in their numbers in one line."""

    rows: tuple[Row, ...]
    verified: bool = True
    changes: tuple[tuple[nn.Module, Spec], ...] = field(default=(), repr=False)

    @property
    def replaced(self) -> tuple[Row, ...]:
        """Modules that use a fused op now."""
        return tuple(row for row in self.rows if not row.skipped)

    @property
    def skipped(self) -> tuple[Row, ...]:
        """Modules that look as if they could, and why they don't."""
        return tuple(row for row in self.rows if row.skipped)

    def counts(self) -> dict[str, int]:
        """Number of replaced modules by op."""
        return dict(Counter(row.new for row in self.replaced))

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            key = (re.sub(r"\d+", "*", row.module), row.old, row.new, row.skipped, row.note)
            groups.setdefault(key, []).append(row)
        lines = [("module", "count", "old", "new", "error", "")]
        for (name, old, new, skipped, note), rows in groups.items():
            errors = [row.error for row in rows if row.error is not None]
            shown = f"{max(errors):.1e}" if errors else "-"
            text = f"skipped: {skipped}" if skipped else note
            lines.append((name or "(model)", str(len(rows)), old, new, shown, text))
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        table = [
            "  ".join((*(x.ljust(w) for x, w in zip(line, widths, strict=False)), line[5])).rstrip()
            for line in lines
        ]
        totals = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts().items()))
        tail = "" if self.verified else " (not checked)"
        table.append(f"replaced: {totals or 'nothing'}{tail}; skipped: {len(self.skipped)}")
        return "\n".join(table)


def patch(model: nn.Module, *, ops: str | Iterable[str] = "auto", verify: bool = True) -> Report:
    """Make a model use the fused ops, in place.

    Args:
        model: any module; modules inside are recognised by what they compute.
        ops: "auto" for all, or names from `patch.KINDS` ("rms_norm", "attention", "linear_cross_entropy", ...).
        verify: compare each replaced module with the original, forward and gradients, in float32 and in the model's
            dtype, and keep it only if they agree. Without, a module is still tried once, forward only in float32,
            where more than one formula is possible.

    Returns:
        A report: one row per module, replaced or skipped, with the error found or the reason. Modules that are
        patched already are left as they are and have no row.

    Raises:
        ValueError: an unknown op.
    """
    wanted = KINDS if ops == "auto" else (ops,) if isinstance(ops, str) else tuple(ops)
    for name in wanted:
        if name not in KINDS:
            raise ValueError(
                f"ops has {name!r}, which is not known: use 'auto' or some of {', '.join(KINDS)}"
            )
    patcher = _Patcher(model, frozenset(wanted), verify, automatic=ops == "auto")
    patcher.run()
    return Report(tuple(patcher.rows), verify, tuple(patcher.changes))


def unpatch(model: nn.Module) -> int:
    """Undo `patch` in a model and everything inside it; returns the number of modules that were changed back."""
    return sum(swap.revert(module) for module in model.modules())


@contextmanager
def patched(model: nn.Module, *, ops: str | Iterable[str] = "auto", verify: bool = True) -> Iterator[Report]:
    """Have a model use the fused ops inside the `with` block; what was patched before stays so afterwards."""
    report = patch(model, ops=ops, verify=verify)
    try:
        yield report
    finally:
        for module, spec in reversed(report.changes):
            swap.revert(module, spec)


class _Patcher:
    """One run over a model."""

    def __init__(self, model: nn.Module, wanted: frozenset[str], verify: bool, *, automatic: bool) -> None:
        self.model, self.wanted, self.verify, self.automatic = model, wanted, verify, automatic
        self.device = check.device_of(model)
        self.rows: list[Row] = []
        self.changes: list[tuple[nn.Module, Spec]] = []
        self.covered: set[int] = set()

    def run(self) -> None:
        """Every module, outer ones first: what an MLP does by itself needs no replacement inside it."""
        for name, module in list(self.model.named_modules()):
            if id(module) in self.covered or isinstance(module, torch.jit.ScriptModule):
                continue
            for rule in RULES:
                self._try(rule(module), name, module)
            self._try(mlp.propose_activation(module, self.device), name, module)
            if "linear_cross_entropy" in self.wanted:
                self._head(name, module)

    def _try(self, proposal: Proposal | None, name: str, module: nn.Module) -> None:
        if proposal is None:
            return
        if any(spec in proposal.hypotheses for spec in swap.layers(module)[1]):
            self.covered.update(map(id, proposal.covers))
            return
        chosen = self._choose(proposal, module)
        if isinstance(chosen, str):
            if not proposal.quiet and proposal.kind in self.wanted:
                self._skip(name, module, proposal.kind, chosen)
            return
        kind = proposal.kinds.get(chosen, proposal.kind)
        if kind not in self.wanted:
            return
        slower = mlp.slower_here(chosen, self.device) if self.automatic else None
        if slower:
            self._skip(name, module, kind, slower)
            return
        self._replace(name, module, chosen, proposal, kind)

    def _choose(self, proposal: Proposal, module: nn.Module) -> Spec | str:
        """The hypothesis that computes what the module computes, or the reason why none does."""
        if "forward" in module.__dict__:
            return "has a forward of its own, set by other code"
        if not proposal.hypotheses or not proposal.inputs:
            return proposal.note or "can't be called for the check"
        if check.device_of(module).type == "meta":
            return "is on the meta device, where nothing can be compared"
        if not self.verify and len(proposal.hypotheses) == 1:
            return proposal.hypotheses[0]
        best, least = proposal.hypotheses[0], float("inf")
        try:
            for spec in proposal.hypotheses:
                distance = check.same_forward(module, spec, proposal.inputs[0])
                if distance < least:
                    best, least = spec, distance
                if distance <= check.SAME_FUNCTION:
                    return spec
        except check.MismatchError as mismatch:
            return str(mismatch)
        except Exception as error:  # a module may fail in any way on input it was not made for
            return f"can't be called for the check ({type(error).__name__}: {str(error)[:80]})"
        kind = proposal.kinds.get(best, proposal.kind)
        return f"is no {kind}: output differs by {least:.1e} in float32, limit {check.SAME_FUNCTION:.0e}"

    def _replace(self, name: str, module: nn.Module, spec: Spec, proposal: Proposal, kind: str) -> None:
        error: float | None = None
        try:
            if self.verify:
                attention_rules.require_reached(module, spec, proposal.inputs)
                error = max(check.verify(module, spec, inputs) for inputs in proposal.inputs)
            swap.apply(module, spec)
        except check.MismatchError as mismatch:
            self._skip(name, module, kind, str(mismatch))
            return
        except Exception as failure:
            self._skip(
                name, module, kind, f"failed in the check ({type(failure).__name__}: {str(failure)[:80]})"
            )
            return
        self.changes.append((module, spec))
        self.covered.update(map(id, proposal.covers))
        self.rows.append(Row(name, type(module).__name__, kind, error, note=proposal.note))

    def _skip(self, name: str, module: nn.Module, kind: str, reason: str) -> None:
        self.rows.append(Row(name, type(module).__name__, kind, None, skipped=reason))

    def _head(self, name: str, module: nn.Module) -> None:
        found = loss.find_head(module)
        if found is None:
            return
        owner, head = found
        if owner in swap.layers(module)[1]:
            return
        proposal = loss.propose_head(head)
        blocked = "forward" in module.__dict__ or "forward" in head.__dict__
        reason = "has a forward of its own, set by other code" if blocked else proposal.note
        if blocked or not proposal.hypotheses:
            self._skip(name, module, "linear_cross_entropy", reason)
            return
        try:
            error = loss.verify(head) if self.verify else None
        except check.MismatchError as mismatch:
            self._skip(name, module, "linear_cross_entropy", str(mismatch))
            return
        head_name = f"{name}.{owner.head}" if name else owner.head
        self._try(linear.propose(head), head_name, head)  # below lazy logits, for when they are wanted
        for target, spec in ((head, loss.HeadSpec()), (module, owner)):
            if spec not in swap.layers(target)[1]:  # a head may serve a model and one around it
                swap.apply(target, spec)
                self.changes.append((target, spec))
        self.rows.append(Row(name, type(module).__name__, "linear_cross_entropy", error, note=proposal.note))
