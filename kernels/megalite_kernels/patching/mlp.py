"""Activations and gated MLPs of any codebase, recognised by what they compute."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalite_kernels.backend import choose
from megalite_kernels.ops.activation import geglu, gelu, relu_squared, swiglu
from megalite_kernels.patching.check import Inputs, random_input
from megalite_kernels.patching.common import Proposal, plain, projections, takes_one_input
from megalite_kernels.patching.swap import Methods, Spec, one_input
from megalite_kernels.reference import activation as reference

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": gelu,
    "gelu": lambda x: gelu(x, approximate="none"),
    "relu2": relu_squared,
}
GATED: dict[str, Callable[..., Tensor]] = {
    "silu": lambda gate, up=None: swiglu(gate, up),
    "gelu_tanh": lambda gate, up=None: geglu(gate, up),
    "gelu": lambda gate, up=None: geglu(gate, up, approximate="none"),
}
OPS = {"gelu_tanh": "gelu", "gelu": "gelu", "relu2": "relu_squared"}
GATED_OPS = {"silu": "swiglu", "gelu_tanh": "geglu", "gelu": "geglu"}


@dataclass(frozen=True)
class ActivationSpec(Spec):
    """A module that is nothing but an activation."""

    activation: str

    def methods(self, cls: type[nn.Module]) -> Methods:
        function = ACTIVATIONS[self.activation]
        return {"forward": one_input(lambda _, x: function(x) if plain(x) else None, cls.forward)}


@dataclass(frozen=True)
class MLPSpec(Spec):
    """`down(activation(up(x)))`; the projections are still called, so their hooks and adapters work."""

    up: str
    down: str
    activation: str

    def methods(self, cls: type[nn.Module]) -> Methods:
        function = ACTIVATIONS[self.activation]

        def mlp(module: nn.Module, x: Tensor) -> Tensor | None:
            hidden = getattr(module, self.up)(x)
            return getattr(module, self.down)(function(hidden))

        return {"forward": one_input(mlp, cls.forward)}


@dataclass(frozen=True)
class GatedSpec(Spec):
    """`down(activation(gate(x)) * up(x))`; with gate == up one projection makes both, halves swapped or not."""

    gate: str
    up: str
    down: str
    activation: str
    swapped: bool = False

    def methods(self, cls: type[nn.Module]) -> Methods:
        function = GATED[self.activation]

        def mlp(module: nn.Module, x: Tensor) -> Tensor:
            if self.gate != self.up:
                hidden = function(getattr(module, self.gate)(x), getattr(module, self.up)(x))
            elif self.swapped:
                up, gate = getattr(module, self.up)(x).chunk(2, dim=-1)
                hidden = function(gate, up)
            else:
                hidden = function(getattr(module, self.up)(x))
            return getattr(module, self.down)(hidden)

        return {"forward": one_input(mlp, cls.forward)}


def propose_activation(module: nn.Module, device: torch.device) -> Proposal | None:
    """An activation is a leaf of one input without parameters or buffers."""
    stateless = (
        not list(module.parameters()) and not list(module.buffers()) and len(list(module.modules())) == 1
    )
    if not stateless or isinstance(module, nn.Dropout) or not takes_one_input(module):
        return None
    points = torch.linspace(-8, 8, 257, device=device).bfloat16()

    def inputs(dtype: torch.dtype) -> tuple[tuple[Tensor], dict[str, object]]:
        return (points.to(dtype),), {}

    specs: dict[Spec, str] = {ActivationSpec(name): op for name, op in OPS.items()}
    named = "gelu" in type(module).__name__.lower()
    return Proposal("gelu", tuple(specs), (inputs,), kinds=dict(specs), quiet=not named)


def propose_mlp(module: nn.Module) -> Proposal | None:
    """An MLP has one input, two or three projections, and nothing else but activations."""
    sizes = projections(module)
    others = [child for name, child in module.named_children() if name not in sizes]
    simple = all(not list(child.parameters()) and not list(child.children()) for child in others)
    if len(sizes) not in (2, 3) or not simple or not takes_one_input(module):
        return None
    specs = _gated_pair(sizes) if len(sizes) == 3 else _packed_or_plain(sizes, others)
    if not specs:
        return None
    hidden = sizes[next(iter(specs)).up][0]  # type: ignore[attr-defined]
    proposal = Proposal("swiglu", tuple(specs), (_rows(module, hidden),), kinds=dict(specs), quiet=True)
    active = [child for child in others if isinstance(child, nn.Dropout) and child.p > 0]
    if active:
        reason = "has dropout inside, whose place can't be told"
        return Proposal(proposal.kind, (), (), note=reason, quiet=len(sizes) == 2)
    return dataclasses.replace(proposal, covers=tuple(others))


def _gated_pair(sizes: dict[str, tuple[int, int]]) -> dict[Spec, str]:
    specs: dict[Spec, str] = {}
    for gate, up, down in itertools.permutations(sizes):
        if sizes[gate] == sizes[up] and sizes[down][0] == sizes[up][1] and sizes[up][0] > 0:
            specs.update({GatedSpec(gate, up, down, name): op for name, op in GATED_OPS.items()})
    return specs


def _packed_or_plain(sizes: dict[str, tuple[int, int]], others: list[nn.Module]) -> dict[Spec, str]:
    specs: dict[Spec, str] = {}
    for up, down in itertools.permutations(sizes):
        if sizes[down][0] * 2 == sizes[up][1]:
            for swapped in (False, True):
                specs.update({GatedSpec(up, up, down, name, swapped): op for name, op in GATED_OPS.items()})
        elif sizes[down][0] == sizes[up][1] and not [x for x in others if not isinstance(x, nn.Dropout)]:
            # With an activation of its own the module is left as it is, and the activation is replaced.
            specs.update({MLPSpec(up, down, name): op for name, op in OPS.items()})
    return specs


def _rows(module: nn.Module, hidden: int) -> Inputs:
    def inputs(dtype: torch.dtype) -> tuple[tuple[Tensor], dict[str, object]]:
        return (random_input(module, 1, 17, hidden).bfloat16().to(dtype),), {}

    return inputs


def slower_here(spec: Spec, device: torch.device) -> str | None:
    """Why an activation is better left alone: torch's own single call beats a reference of several."""
    if not isinstance(spec, ActivationSpec):
        return None
    probe = torch.zeros(1, dtype=torch.float32, device=device)
    if choose("activation_fwd", device.type, (probe, spec.activation)) is not reference.forward:
        return None
    return f"no fused kernel of {spec.activation} on {device.type} here, torch's own call is faster"
