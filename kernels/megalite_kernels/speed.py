"""How fast a case runs, next to the same in plain torch, to a copy of its bytes, and to a matrix product.

The doctor and the benchmarks time cases through this one function, so their figures mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.backend import use_backend
from megalite_kernels.cases.base import Case, Inputs, Shape
from megalite_kernels.products import fast_products, square_products
from megalite_kernels.timing import Timing, copy_of, measure

OURS, EAGER, COMPILED, COPY, PRODUCT = "megalite", "torch", "compile", "copy", "product"
"""Variants: our op, plain torch, the same under torch.compile; and the two yardsticks."""
FORWARD, BOTH = "forward", "forward+backward"
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrix product that compute-bound ops are held to: large enough to reach the peak."""


@dataclass(frozen=True, slots=True)
class Speed:
    """One variant of one case in one dtype, forward or forward and backward."""

    case: str
    variant: str
    passes: str
    dtype: torch.dtype
    shape: Shape
    timing: Timing
    bytes: int
    flops: int
    """Floor of the work, whatever the variant really moves and computes."""
    of_copy: float
    """Time of a copy of the same bytes, over this time."""
    of_gemm: float
    """Rate over that of the fastest square matrix product in the same dtype."""

    @property
    def gb_per_s(self) -> float:
        """Rate of the floor's bytes."""
        return self.bytes / self.timing.median_ms / 1e6

    @property
    def gflops(self) -> float:
        """Rate of the floor's FLOPs."""
        return self.flops / self.timing.median_ms / 1e6


def measure_case(
    case: Case,
    shape: Shape,
    dtype: torch.dtype,
    variants: Mapping[str, Callable[..., Any]],
    *,
    device: str = "cpu",
    rounds: int = 20,
    budget_s: float = 2.0,
    cold: bool = True,
    graphs: bool = True,
    backends: Mapping[str, tuple[str, ...]] | None = None,
) -> list[Speed]:
    """Times every variant, forward and (where there is one) forward and backward, interleaved.

    Args:
        variants: name to a function that is called as `case.ours` is.
        device, rounds, budget_s, cold, graphs: as in `timing.measure`.
        backends: name of a variant to the back-ends it is forced to run on, forward and backward.

    Returns:
        The variants' speeds; those of the yardsticks too, as variants "copy" and "product".
    """
    inputs = case.make(shape, torch.Generator(device).manual_seed(0)).to(dtype)
    itemsize = dtype.itemsize
    work = case.work(shape, itemsize)
    passes = [FORWARD, BOTH] if case.grads else [FORWARD]
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for kind in passes:
        for name, function in variants.items():
            call = prepared(case, function, inputs, backward=kind == BOTH)
            calls[name, kind] = forced(call, backends[name]) if backends and name in backends else call
        calls[COPY, kind] = copy_of(work.bytes(kind == BOTH), device)
    size = PRODUCT_SIZE[device]
    products = square_products(size, dtype, device, fast_products(dtype, device))
    keys = {f"{name} {kind}": (name, kind) for name, kind in calls}
    timings = measure(
        {text: calls[key] for text, key in keys.items()} | products,
        rounds=rounds, device=device, cold=cold, graphs=graphs, budget_s=budget_s,
    )  # fmt: skip
    found = {keys[text]: timing for text, timing in timings.items() if text in keys}
    found[PRODUCT, FORWARD] = min((timings[name] for name in products), key=lambda timing: timing.best_ms)
    peak = 2 * size**3 / found[PRODUCT, FORWARD].best_ms / 1e6
    speeds = []
    for (name, kind), timing in found.items():
        moved, flops = work.bytes(kind == BOTH), work.flops(kind == BOTH)
        if name == PRODUCT:
            moved, flops = 3 * size**2 * itemsize, 2 * size**3
        elif name == COPY:
            flops = 0
        of_copy = 0.0 if name == PRODUCT else found[COPY, kind].median_ms / timing.median_ms
        of_gemm = flops / timing.median_ms / 1e6 / peak
        speeds.append(Speed(case.name, name, kind, dtype, shape, timing, moved, flops, of_copy, of_gemm))
    return speeds


def prepared(
    case: Case, function: Callable[..., Any], inputs: Inputs, *, backward: bool
) -> Callable[[], object]:
    """The call of a case, forward only or with its backward, as a function of no arguments."""
    if not backward:
        leaves = [x.detach() for x in inputs.leaves]

        def forward() -> object:
            with torch.no_grad():
                return function(*leaves, *inputs.fixed)

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs.leaves]
    weights: list[Tensor] = []

    def both() -> object:
        returned = function(*leaves, *inputs.fixed)
        outputs = list(returned) if isinstance(returned, tuple) else [returned]
        if not weights:
            weights.extend(torch.randn_like(out) for out in outputs)
        return torch.autograd.grad(outputs, leaves, weights, allow_unused=True)

    return both


def forced(call: Callable[[], object], names: tuple[str, ...]) -> Callable[[], object]:
    """The same call on these back-ends."""

    def run() -> object:
        with use_backend(*names):
            return call()

    return run


def compiled(case: Case) -> Callable[..., Any]:
    """The case in plain torch under `torch.compile`: element-wise ops from the version that it fuses best."""
    function = case.plain if case.bound == "memory" else case.baseline()
    return torch.compile(function, dynamic=False)
