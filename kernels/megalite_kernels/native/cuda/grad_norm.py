"""Norm of all gradients by the kernels of grad_norm.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels.native.cuda import runtime
from megalite_kernels.native.cuda.kernels import grad_norm as kernels

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float"}


def norm(grads: list[Tensor]) -> Tensor:
    """Backend "cuda" of `grad_norm`: two launches for up to SLOTS tensors of one dtype.

    Smaller tensors than a chunk are copied together first, by dtype; every further dtype, and every SLOTS tensors of
    one, take a launch more.
    """
    launches = _launches(grads)
    counts = [sum(kernels.chunks(x.numel()) for x in tensors) for tensors in launches]
    partial = grads[0].new_empty(sum(counts), dtype=torch.float64)
    result = grads[0].new_empty((), dtype=torch.float32)
    first = 0
    for tensors, count in zip(launches, counts, strict=True):
        slots = [(x, x.numel()) for x in tensors] + [(None, 0)] * (kernels.SLOTS - len(tensors))
        arguments = [partial[first:], *(part for slot in slots for part in slot)]
        runtime.launch(kernels.partial(ELEMENTS[tensors[0].dtype]), (count, 1, 1), arguments, partial.device)
        first += count
    runtime.launch(kernels.total(), (1, 1, 1), [partial, result, partial.numel()], partial.device)
    return result


def _launches(grads: list[Tensor]) -> list[list[Tensor]]:
    """The tensors of each launch: of one dtype, in order, the small ones as one at the end."""
    large: dict[torch.dtype, list[Tensor]] = {}
    small: dict[torch.dtype, list[Tensor]] = {}
    for x in grads:
        if x.numel():
            kind = small if x.numel() < kernels.CHUNK else large
            kind.setdefault(x.dtype, []).append(x.contiguous())
    for dtype, tensors in small.items():
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        large.setdefault(dtype, []).append(joined)
    return [
        tensors[at : at + kernels.SLOTS]
        for tensors in large.values()
        for at in range(0, len(tensors), kernels.SLOTS)
    ]
