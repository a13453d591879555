"""The matrix products that other work is held against: torch's, and on CPUs this library's, where worth their time."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megalite_kernels.ops.linear import project

TORCH, OURS = "torch", "own kernel"
PROBE_SIZE = 384
"""Enough for our product to be used at all, and little for the slowest: 0.2 s in all on a Zen 3, where torch takes a
minute for one product of 2048³ in bf16."""
HOPELESS = 8
"""Who takes so many times as long as the fastest is left out. torch's bf16 on that CPU, which has AVX2 alone, takes 26
times as long as ours at this size with one thread, 49 times with two; in fp32 the two are within 15 %."""

Product = Callable[[Tensor, Tensor], Callable[[], object]]
"""Makes, of left [M, K] and right [K, N] of any strides, the call that multiplies them."""


def fast_products(dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Product]:
    """Who multiplies matrices here, by name: `TORCH`, and on CPUs `OURS`, without one that is hopelessly slow."""
    device = torch.device(device)
    if device.type != "cpu":
        return {TORCH: by_torch}
    products: dict[str, Product] = {TORCH: by_torch, OURS: by_us}
    calls = square_products(PROBE_SIZE, dtype, device, products)
    seconds = {name: _seconds(call) for name, call in calls.items()}
    return {
        name: product
        for name, product in products.items()
        if seconds[name] < HOPELESS * min(seconds.values())
    }


def square_products(
    size: int, dtype: torch.dtype, device: str | torch.device, products: dict[str, Product]
) -> dict[str, Callable[[], object]]:
    """The call of each product for two `size` x `size` matrices, 2 size³ FLOPs.

    Random numbers: zeros and constants draw less power and flatter the figure.
    """
    generator = torch.Generator(device=device).manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    return {name: product(left, right) for name, product in products.items()}


def by_torch(left: Tensor, right: Tensor) -> Callable[[], object]:
    """torch.mm into memory that is there already."""
    return partial(torch.mm, left, right, out=left.new_empty(left.shape[0], right.shape[1]))


def by_us(left: Tensor, right: Tensor) -> Callable[[], object]:
    """`project`, as the layers call it; torch's again where that is the faster one of the two for the shape."""
    return partial(project, left, right.t())


def _seconds(call: Callable[[], object]) -> float:
    """The best of three calls, after one more."""
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])
