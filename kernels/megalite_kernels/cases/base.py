"""What a case of an op is: how to call it, what it must agree with, what it must move and compute at least."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = Mapping[str, int]
"""Sizes by the letters of the house: T tokens, H hidden, F ffn, V vocabulary, B, S, N, K, D, n elements."""


@dataclass(frozen=True, slots=True)
class Work:
    """The least that a call must move and compute, forward and backward."""

    forward_bytes: int
    backward_bytes: int
    """Each input read once, each output written once."""
    forward_flops: int
    backward_flops: int
    """Adds and multiplies; exp, tanh and rsqrt count as one."""

    def bytes(self, backward: bool) -> int:
        """Of the forward, or of forward and backward together."""
        return self.forward_bytes + (self.backward_bytes if backward else 0)

    def flops(self, backward: bool) -> int:
        """Of the forward, or of forward and backward together."""
        return self.forward_flops + (self.backward_flops if backward else 0)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of a call, in two kinds; the call gets the leaves first."""

    leaves: list[Tensor]
    """Cast to the dtype under test; they get gradients."""
    fixed: list[Tensor] = field(default_factory=list)
    """Targets, tables, fp32 state: kept as they are, widened for the float64 truth."""

    def to(self, dtype: torch.dtype) -> Inputs:
        """Copies in `dtype`, ready to be called with (and written, where the op writes)."""
        wide = dtype == torch.float64
        leaves = [x.detach().to(dtype, copy=True) for x in self.leaves]
        fixed = [x.to(dtype if wide and x.is_floating_point() else x.dtype, copy=True) for x in self.fixed]
        return Inputs(leaves, fixed)

    @property
    def all(self) -> list[Tensor]:
        """Leaves, then fixed."""
        return [*self.leaves, *self.fixed]


@dataclass(frozen=True, slots=True)
class Case:
    """One way to call a public op, with what is needed to check and to time it."""

    op: str
    """Name of the public function."""
    name: str
    """Unique: the op, or "op variant"."""
    ours: Callable[..., Any]
    """Called with an `Inputs.all`."""
    plain: Callable[..., Any]
    """The same in plain torch, in any dtype: defines the truth (in float64) and the accepted error."""
    make: Callable[[Shape, torch.Generator], Inputs]
    """Random float32 inputs on the generator's device."""
    work: Callable[[Shape, int], Work]
    """Of a shape and the bytes of one element."""
    check: Shape
    """Small, and ragged for every block size."""
    doctor: Shape
    """A training shape that takes milliseconds on one CPU core."""
    cpu: tuple[Shape, ...] = ()
    cuda: tuple[Shape, ...] = ()
    """Training shapes that the benchmarks measure."""
    eager: Callable[..., Any] | None = None
    """What a model written in plain torch would call, where that is faster than `plain`."""
    bound: str = "memory"
    """"memory": held to a copy of the same bytes; "compute": to a matrix product of the same dtype."""
    grads: bool = True
    """Whether there is a backward."""
    written: tuple[int, ...] = ()
    """Places in `Inputs.all` that the call, or its backward, writes: results too."""
    floor: float = 1.0
    magnitude: float = 0.0
    """As in `testing.assert_as_accurate`."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    """Checked and timed on the CPU; a GPU gets fp16 too."""

    def baseline(self) -> Callable[..., Any]:
        """What plain torch is timed as."""
        return self.eager or self.plain

    def shapes(self, device: str) -> tuple[Shape, ...]:
        """Training shapes for a device type."""
        return self.cuda if device == "cuda" else self.cpu


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)


def choices(generator: torch.Generator, limit: int, *shape: int) -> Tensor:
    """Integers from 0 up to `limit`, int64, on the generator's device."""
    return torch.randint(0, limit, shape, generator=generator, device=generator.device)
