"""The head and its loss: a model that is given targets while it trains gets its loss without making logits."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalite_kernels.patching import check
from megalite_kernels.patching.check import Inputs, random_input
from megalite_kernels.patching.common import Proposal, features, plain
from megalite_kernels.patching.lazy import LazyLogits
from megalite_kernels.patching.swap import Methods, Spec, apply, one_input, with_original_signature

TARGETS = ("labels", "targets", "target")
HEADS = ("lm_head", "head", "output", "embed_out", "unembed", "proj_out")
SWITCH = "_megalite_lazy"
"""Attribute that the head has while its owner's forward runs with targets in training."""

CHECK_ROWS = 4096

NOTE = "in training with targets; logits are then computed only if looked at"


@dataclass(frozen=True)
class HeadSpec(Spec):
    """The head gives `LazyLogits` while its owner asks for a loss, and logits otherwise."""

    def methods(self, cls: type[nn.Module]) -> Methods:
        def head(module: nn.Module, x: Tensor) -> Any:
            weight, bias = module.weight, getattr(module, "bias", None)
            if SWITCH not in module.__dict__ or not plain(x, weight, bias):  # type: ignore[arg-type]
                return None
            return lazy(x, weight, bias)  # type: ignore[arg-type]

        return {"forward": one_input(head, cls.forward)}


@dataclass(frozen=True)
class OwnerSpec(Spec):
    """The model asks its head for lazy logits where it trains and is given targets."""

    head: str
    target: str
    position: int

    def methods(self, cls: type[nn.Module]) -> Methods:
        original = cls.forward

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            target = args[self.position] if len(args) > self.position else kwargs.get(self.target)
            if not module.training or target is None:
                return original(module, *args, **kwargs)
            head = module.get_submodule(self.head)
            head.__dict__[SWITCH] = True
            try:
                return original(module, *args, **kwargs)
            finally:
                head.__dict__.pop(SWITCH, None)

        return {"forward": with_original_signature(forward, original)}


@dataclass(frozen=True)
class LossCheckSpec(Spec):
    """For the check only: a head whose forward is the mean cross-entropy, plain or fused."""

    fused: bool

    def methods(self, cls: type[nn.Module]) -> Methods:
        original = cls.forward

        def forward(module: nn.Module, x: Tensor, target: Tensor) -> Tensor:
            if self.fused:
                logits: Any = lazy(x, module.weight, getattr(module, "bias", None))  # type: ignore[arg-type]
            else:
                logits = original(module, x)
            return functional.cross_entropy(logits.float(), target)

        return {"forward": forward}


def lazy(x: Tensor, weight: Tensor, bias: Tensor | None) -> LazyLogits:
    """Logits of the dtype that a product would have here."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return LazyLogits(x, weight, bias, dtype)


def find_head(module: nn.Module) -> tuple[OwnerSpec, nn.Module] | None:
    """The output head of a module whose forward takes targets, if it has one."""
    try:
        names = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return None
    target = next((name for name in TARGETS if name in names), None)
    if target is None:
        return None
    name = _declared_head(module) or _head_by_size(module)
    if name is None:
        return None
    return OwnerSpec(name, target, names.index(target)), module.get_submodule(name)


def _declared_head(module: nn.Module) -> str | None:
    """Name of what Hugging Face's `get_output_embeddings` gives."""
    getter = getattr(module, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return next((name for name, child in module.named_modules() if child is head and name), None)


def _head_by_size(module: nn.Module) -> str | None:
    """A child that projects to as many features as an embedding inside has rows, a usual name preferred."""
    rows = {child.num_embeddings for child in module.modules() if isinstance(child, nn.Embedding)}
    sizes = {name: features(child) for name, child in module.named_children()}
    fitting = [name for name, size in sizes.items() if size is not None and size[1] in rows]
    return next((name for name in HEADS if name in fitting), fitting[0] if len(fitting) == 1 else None)


def propose_head(head: nn.Module) -> Proposal:
    """The head itself: a projection with one weight [V, H] and perhaps a bias."""
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    names = {name for name, _ in head.named_parameters()}
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not names <= {"weight", "bias"}:
        return Proposal("linear_cross_entropy", (), (), note="its head is no plain projection")
    if not plain(weight, bias):
        return Proposal("linear_cross_entropy", (), (), note="its head's weight is sharded or quantised")
    return Proposal("linear_cross_entropy", (HeadSpec(),), (loss_call(head, weight),), note=NOTE)


def loss_call(head: nn.Module, weight: Tensor) -> Inputs:
    """Hidden states and targets, one of them ignored."""

    def inputs(dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], dict[str, object]]:
        x = random_input(head, 8, weight.shape[1]).bfloat16().to(dtype)
        target = torch.arange(8, device=x.device) * 7919 % weight.shape[0]
        target[3] = -100
        return (x, target), {}

    return inputs


@dataclass(frozen=True)
class ProjectionSpec(Spec):
    """For the check only: a head that is nothing but a product with its weight."""

    def methods(self, cls: type[nn.Module]) -> Methods:
        def forward(module: nn.Module, x: Tensor) -> Tensor:
            return functional.linear(x, module.weight, getattr(module, "bias", None))  # type: ignore[arg-type]

        return {"forward": forward}


def verify(head: nn.Module) -> float:
    """The head is a projection, and the fused loss agrees with cross_entropy of its logits, as in `check.verify`.

    Losses are compared on the first CHECK_ROWS rows of the vocabulary, so that the check of a large model needs
    little memory.
    """
    weight, bias = _weights(head)

    def hidden(dtype: torch.dtype) -> tuple[tuple[Tensor], dict[str, object]]:
        return (random_input(head, 8, weight.shape[1]).bfloat16().to(dtype),), {}

    distance = check.same_forward(head, ProjectionSpec(), hidden)
    if distance > check.SAME_FUNCTION:
        raise check.MismatchError(f"its head is no plain projection: differs by {distance:.1e} in float32")
    rows = min(CHECK_ROWS, weight.shape[0])
    small = nn.Linear(weight.shape[1], rows, bias=bias is not None, device="meta")
    small.weight = nn.Parameter(weight.detach()[:rows])
    if bias is not None:
        small.bias = nn.Parameter(bias.detach()[:rows])
    apply(small, LossCheckSpec(fused=False))
    return check.verify(small, LossCheckSpec(fused=True), loss_call(small, small.weight))


def _weights(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = head.weight, getattr(head, "bias", None)
    assert isinstance(weight, Tensor)
    return weight, bias
