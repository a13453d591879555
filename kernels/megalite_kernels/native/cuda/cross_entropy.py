"""Cross-entropy by the kernels of cross_entropy.cuh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels.native.cuda import runtime
from megalite_kernels.native.cuda.kernels import cross_entropy as kernels

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float"}
"""Names of the types in csrc/cuda."""


def forward(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Backend "cuda" of `cross_entropy_fwd`; the row kernel `loss` of the chunk plan."""
    logits = _rows(logits)
    loss, lse = _per_row(logits), _per_row(logits)
    _forward(logits, target, 0, options, loss=loss, lse=lse)
    return loss, lse


def stats(logits: Tensor, target: Tensor, start: int, *options: Any) -> Tensor:
    """The row kernel `stats` of the chunk plan."""
    logits = _rows(logits)
    out = logits.new_empty(4, logits.shape[0], dtype=torch.float32)
    _forward(logits, target, start, options, stats=out)
    return out


def local(logits: Tensor, target: Tensor, vocab_start: int, valid_rows: int, *options: Any) -> Tensor:
    """Backend "cuda" of `cross_entropy_local_fwd`."""
    return stats(_rows(logits)[:, :valid_rows], target, vocab_start, *options)


def grad_(logits: Tensor, target: Tensor, scale: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Backend "cuda" of `cross_entropy_grad_`; the row kernel `loss_and_grad` of the chunk plan."""
    _require_rows(logits)
    loss, lse = _per_row(logits), _per_row(logits)
    rows, cols = logits.shape
    device = logits.device
    kernel, kept = kernels.gradient(
        ELEMENTS[logits.dtype], cols, runtime.shared_bytes_limit(device), clusters=runtime.arch(device) >= 90
    )
    scale = scale.float().contiguous()
    arguments = (
        logits, target.contiguous(), scale, loss, lse, kept, logits.stride(0), cols, int(scale.dim() > 0),
        *_options(options),
    )  # fmt: skip
    runtime.launch(kernel, (rows * kernel.cluster, 1, 1), arguments, device)
    return loss, lse


def backward(dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, *options: Any) -> Tensor:
    """Backend "cuda" of `cross_entropy_bwd`."""
    cols = logits.shape[1]
    return local_backward(logits, target, lse, dloss, 0, cols, cols, *options)


def local_backward(logits: Tensor, target: Tensor, lse: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    """Backend "cuda" of `cross_entropy_local_bwd`."""
    dlogits = logits.new_empty(logits.shape)
    _backward(_rows(logits), dlogits, target, lse, scale, *rest)
    return dlogits


def local_backward_(logits: Tensor, *rest: Any) -> None:
    """Backend "cuda" of `cross_entropy_local_bwd_`."""
    _require_rows(logits)
    _backward(logits, logits, *rest)


def grad(
    logits: Tensor, target: Tensor, lse: Tensor, scale: Tensor, start: int, vocabulary: int, *options: Any
) -> None:
    """The row kernel `grad` of the chunk plan."""
    _backward(logits, logits, target, lse, scale, start, logits.shape[1], vocabulary, *options)


def _forward(
    logits: Tensor,
    target: Tensor,
    start: int,
    options: tuple[Any, ...],
    *,
    loss: Tensor | None = None,
    lse: Tensor | None = None,
    stats: Tensor | None = None,
) -> None:
    rows, cols = logits.shape
    arguments = (
        logits, target.contiguous(), loss, lse, stats, logits.stride(0), rows, cols, start, *_options(options)
    )  # fmt: skip
    runtime.launch(kernels.forward(ELEMENTS[logits.dtype]), (rows, 1, 1), arguments, logits.device)


def _backward(
    logits: Tensor,
    out: Tensor,
    target: Tensor,
    lse: Tensor,
    scale: Tensor,
    start: int,
    valid: int,
    vocabulary: int,
    *options: Any,
) -> None:
    """Columns from `valid` on are padding, and get zeros."""
    rows, width = logits.shape
    scale = scale.float().contiguous()
    arguments = (
        logits, out, target.contiguous(), lse.float().contiguous(), scale, logits.stride(0), out.stride(0),
        valid, width, start, vocabulary, int(scale.dim() > 0), *_options(options),
    )  # fmt: skip
    runtime.launch(kernels.backward(ELEMENTS[logits.dtype]), (rows, 1, 1), arguments, logits.device)


def _options(options: tuple[Any, ...]) -> tuple[int, float, float, float]:
    ignore_index, label_smoothing, z_loss, softcap = options
    return ignore_index, float(label_smoothing), float(z_loss), float(softcap)


def _rows(logits: Tensor) -> Tensor:
    """Logits whose columns are side by side; the rows may be further apart."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _require_rows(logits: Tensor) -> None:
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits have stride {logits.stride()}: pass contiguous rows, they are overwritten")


def _per_row(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)
