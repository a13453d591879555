"""What the launchers of row kernels share: names of types, alignment, weights, grids, and the last sum."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels.native.cuda.kernels.rows import Rows, sum_kernel
from megalite_kernels.native.cuda.runtime import launch, multiprocessors

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float"}
"""Names of the dtypes in the sources."""
THREADS_OF_BACKWARD = 512
"""Of a multiprocessor: RESIDENT_BLOCKS of csrc/cuda/rows.cuh times a block's."""


def readable(weight: Tensor | None, element: Tensor) -> Tensor | None:
    """A weight as kernels for rows like `element` read it: of the same dtype or float32, contiguous."""
    if weight is None:
        return None
    if weight.dtype not in (element.dtype, torch.float32):
        weight = weight.to(torch.float32)
    return weight.contiguous()


def aligned(hidden: int, *tensors: Tensor | None) -> bool:
    """Whether rows of `hidden` elements of the first tensor's dtype start at multiples of 16 bytes in all of them."""
    first = tensors[0]
    assert first is not None
    if hidden * first.element_size() % 16:
        return False
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)


def backward_blocks(rows: int, layout: Rows, stripes: int, device: torch.device) -> int:
    """Blocks along the rows: what the device runs at a time, and not more than there is work for."""
    resident = max(1, THREADS_OF_BACKWARD // layout.threads) * multiprocessors(device)
    return min(-(-rows // layout.groups), max(1, resident // stripes))


def sum_partials(partial: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The sums over the middle of `partial` [1 or 2, parts, columns] fp32, each [columns] of `dtype`."""
    planes, parts, columns = partial.shape
    sums = [partial.new_empty(columns, dtype=dtype) for _ in range(planes)]
    grid = (-(-columns // 32), planes, 1)
    args = (partial, sums[0], sums[-1], parts, columns)
    launch(sum_kernel(ELEMENTS[dtype]), grid, args, partial.device)
    return sums
