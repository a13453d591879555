"""Chunk plan of the fused output projection and cross-entropy, shared by every backend.

The logits [T, V] never exist whole: a chunk of rows is projected into one workspace, turned into loss and
gradient in place by a row kernel, and consumed by two more products before the next chunk comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.reference.common import wide_dtype

RowKernel = Callable[..., "tuple[Tensor, Tensor]"]

CHUNK_ROWS = 1024
"""Rows of a chunk. Each chunk moves about 16 V H bytes of weight, its gradient and the fp32 accumulator, and
does 6 C V H operations: at 430 GFLOP/s against 13 GB/s (a 2-core Zen 4) C = 88 balances them, so with 1024 rows
the traffic costs under a tenth."""

CHUNK_BYTES = 64 << 20
"""Limit of the workspace where the vocabulary is large (256k: 128 rows in bf16)."""


def chunk_rows(tokens: int, vocabulary: int, itemsize: int) -> int:
    """Rows a chunk holds: CHUNK_ROWS, fewer if the workspace would exceed CHUNK_BYTES, never under 128."""
    fitting = CHUNK_BYTES // max(1, vocabulary * itemsize) // 128 * 128
    return max(1, min(tokens, CHUNK_ROWS, max(128, fitting)))


def losses(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *options: Any, row_kernel: RowKernel
) -> Tensor:
    """Loss of each row [T] in the wide dtype; row_kernel(logits, target, *options) gives (loss, lse)."""
    out = x.new_empty(x.shape[0], dtype=wide_dtype(x))
    rows = chunk_rows(x.shape[0], weight.shape[0], x.element_size())
    workspace = x.new_empty(rows, weight.shape[0])
    for start in range(0, x.shape[0], rows):
        part = slice(start, min(start + rows, x.shape[0]))
        logits = _project(x[part], weight, bias, workspace)
        out[part] = row_kernel(logits, target[part], *options)[0]
    return out


def grads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    *options: Any,
    row_kernel: RowKernel,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [T], dx like x, dweight [V, H] and dbias [V] in the wide dtype; dbias is empty without a bias).

    The gradients are those of `sum(scale * loss)`, scale being a scalar or [T]. row_kernel(logits, target,
    scale, *options) gives (loss, lse) and overwrites the logits with their gradient.
    """
    wide = wide_dtype(x)
    loss = x.new_empty(x.shape[0], dtype=wide)
    dx = torch.empty_like(x)
    dweight = torch.zeros_like(weight, dtype=wide)
    dbias = x.new_zeros(0 if bias is None else weight.shape[0], dtype=wide)
    rows = chunk_rows(x.shape[0], weight.shape[0], x.element_size())
    workspace = x.new_empty(rows, weight.shape[0])
    for start in range(0, x.shape[0], rows):
        part = slice(start, min(start + rows, x.shape[0]))
        logits = _project(x[part], weight, bias, workspace)
        loss[part] = row_kernel(logits, target[part], scale[part] if scale.dim() else scale, *options)[0]
        torch.mm(logits, weight, out=dx[part])
        if wide == x.dtype:
            dweight.addmm_(logits.t(), x[part])
        else:
            # torch has no bf16 x bf16 -> fp32 product on the CPU: each chunk's sum is rounded once, then added.
            dweight.add_(torch.mm(logits.t(), x[part]))
        if bias is not None:
            dbias.add_(logits.sum(0, dtype=wide))
    return loss, dx, dweight, dbias


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, workspace: Tensor) -> Tensor:
    logits = workspace[: x.shape[0]]
    if bias is None:
        return torch.mm(x, weight.t(), out=logits)
    return torch.addmm(bias, x, weight.t(), out=logits)
