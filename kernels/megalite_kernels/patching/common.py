"""What every rule shares: what it proposes for a module, and how modules are looked at."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megalite_kernels.ops.checks import FLOATS, is_plain
from megalite_kernels.patching.check import Inputs
from megalite_kernels.patching.swap import Spec


@dataclass(frozen=True, slots=True)
class Proposal:
    """A module that looks like one a fused op can do."""

    kind: str
    """The op, by its public name."""
    hypotheses: tuple[Spec, ...]
    """What it may be, likeliest first; the first one that computes the same is taken."""
    inputs: tuple[Inputs, ...]
    """Calls for the check; all must agree."""
    note: str = ""
    """What a user should know of the replacement."""
    covers: tuple[nn.Module, ...] = ()
    """Modules inside that are no longer called and need no replacement of their own."""
    quiet: bool = False
    """If nothing fits, the module is no near miss and the report stays silent."""
    kinds: dict[Spec, str] = field(default_factory=dict)
    """The op of each hypothesis, where they differ."""


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are tensors of torch's own kinds and of dtypes the ops take: no sharded or quantised ones."""
    return is_plain(*tensors) and all(t is None or t.dtype in FLOATS for t in tensors)


def features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a module that projects its last dim: a Linear, a wrapped one, or GPT-2's Conv1D."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        sizes = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) for size in sizes):
            return sizes  # type: ignore[return-value]
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[0], weight.shape[1]
    return None


def projections(module: nn.Module) -> dict[str, tuple[int, int]]:
    """The child modules that project, by name, with their sizes."""
    found = {name: features(child) for name, child in module.named_children()}
    return {name: sizes for name, sizes in found.items() if sizes is not None}


def required_inputs(module: nn.Module) -> list[inspect.Parameter] | None:
    """Parameters of the forward without a default, or None where the signature can't be read."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]


def takes_one_input(module: nn.Module) -> bool:
    """Whether the forward needs exactly one argument."""
    required = required_inputs(module)
    return required is not None and len(required) == 1


def floats_named(module: nn.Module, word: str) -> Iterator[float]:
    """Values of the module's own float attributes whose name contains a word."""
    for name, value in vars(module).items():
        if word in name and isinstance(value, float):
            yield value


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on, as torch does for its own products."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype in FLOATS[:3] else t for t in tensors)
