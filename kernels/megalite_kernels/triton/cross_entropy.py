"""Cross-entropy rows: one read of the logits for the loss, one read and one write for the gradient.

A program owns a row and goes through it in blocks. Every lane keeps its own maximum and sum, so that the loop has no
reduction over lanes, and one exponential an element suffices: with d = x - max the sum becomes sum * e^-d + 1 where
the maximum grows and sum + e^d where it does not, both of them e^-|d|. A lane adds up at most V / BLOCK terms, which
keeps the rounding of fp32 sums down. Only blocks that are not whole are masked: with a mask of unknown end the loads
of a whole row would be one element each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.triton.launch import Launch, Table, launch

# 4096 columns on 256 threads are 16 each: two 16-byte loads of bf16, and 32 registers of running maxima and sums.
ROWS = Table("cross_entropy_rows", {"default": Launch({"BLOCK_V": 4096}, num_warps=8, num_stages=1)})
LOWEST = tl.constexpr(-3.0e38)
"""Maximum of nothing: finite, because -inf - -inf would be NaN where -inf masks classes."""
ALIGNMENT = tl.constexpr(16)
"""Elements that a vector load wants its address to be a multiple of (32 bytes of bf16)."""


@triton.jit
def capped(x, SOFTCAP: tl.constexpr):
    """c * tanh(x / c) without cancellation near 0; x itself without a cap. Source: Cephes tanhf."""
    if SOFTCAP != 0.0:
        y = x * (1.0 / SOFTCAP)
        z = y * y
        small = z * -5.70498872745e-3 + 2.06390887954e-2
        small = small * z - 5.37397155531e-2
        small = small * z + 1.33314422036e-1
        small = small * z - 3.33332819422e-1
        small = small * z * y + y
        e = tl.exp(-2.0 * tl.abs(y))
        large = (1.0 - e) / (1.0 + e)
        large = tl.where(y < 0.0, -large, large)
        x = tl.where(y != y, y, tl.where(tl.abs(y) < 0.625, small, large)) * SOFTCAP
    return x


@triton.jit
def fold(
    top, total, plain, x, mask,
    SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Running maximum, sum of exponentials and plain sum of each lane, with one more block of logits."""
    s = capped(x.to(tl.float32), SOFTCAP)
    if SMOOTHED:
        plain += tl.where(mask, s, 0.0) if MASKED else s
    if MASKED:
        s = tl.where(mask, s, float("-inf"))
    d = s - top
    e = tl.exp(-tl.abs(d))
    total = tl.where(d > 0.0, total * e + 1.0, total + e)
    top = tl.maximum(top, s, propagate_nan=tl.PropagateNan.ALL)
    return top, total, plain


@triton.jit
def row_sums(
    row_ptr, lead, end,
    SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Maximum, sum of exp(s - maximum) and sum of s over the columns lead .. end; infinities as torch has them."""
    lanes = tl.arange(0, BLOCK_V)
    top = tl.full((BLOCK_V,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    plain = tl.zeros((BLOCK_V,), tl.float32)
    start = 0
    if not ALIGNED:
        mask = (lanes >= lead) & (lanes < end)
        x = tl.load(row_ptr + lanes, mask=mask, other=0.0)
        top, total, plain = fold(top, total, plain, x, mask, SOFTCAP, SMOOTHED, True)
        start = BLOCK_V
    for at in range(start, end - BLOCK_V + 1, BLOCK_V):
        x = tl.load(row_ptr + at + lanes)
        top, total, plain = fold(top, total, plain, x, True, SOFTCAP, SMOOTHED, False)
    tail = end // BLOCK_V * BLOCK_V
    if tail >= start and tail < end:
        mask = tail + lanes < end
        x = tl.load(row_ptr + tail + lanes, mask=mask, other=0.0)
        top, total, plain = fold(top, total, plain, x, mask, SOFTCAP, SMOOTHED, True)
    nan = tl.max((top != top).to(tl.int32), 0) > 0
    best = tl.max(top, 0)
    total_sum = tl.sum(total * tl.exp(top - best), 0)
    infinite = best == float("inf")
    total_sum = tl.where(infinite, float("inf"), total_sum)
    best = tl.where(best <= LOWEST, float("-inf"), best)
    return tl.where(nan, float("nan"), best), tl.where(nan, float("nan"), total_sum), tl.sum(plain, 0)


@triton.jit
def gradient(
    x, hit, lse, gain, smooth, bonus,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """scale * d(loss)/d(logits) of a block; `hit` marks the target's column."""
    s = capped(x.to(tl.float32), SOFTCAP)
    grad = tl.exp(s - lse) * gain - smooth - tl.where(hit, bonus, 0.0)
    if SOFTCAP != 0.0:
        t = s * (1.0 / SOFTCAP)
        grad *= 1.0 - t * t
    return grad


@triton.jit
def row_gradient(
    row_ptr, out_ptr, lead, end, column, lse, scale, vocabulary,
    LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradients of the columns lead .. end, last block first: after a forward those are the ones still in L2."""
    lanes = tl.arange(0, BLOCK_V)
    gain = scale * (1.0 + 2.0 * Z_LOSS * lse)
    smooth = scale * LABEL_SMOOTHING / vocabulary
    bonus = scale * (1.0 - LABEL_SMOOTHING)
    start = 0 if ALIGNED else BLOCK_V
    tail = end // BLOCK_V * BLOCK_V
    if tail >= start and tail < end:
        mask = tail + lanes < end
        x = tl.load(row_ptr + tail + lanes, mask=mask, other=0.0)
        grad = gradient(x, tail + lanes == column, lse, gain, smooth, bonus, SOFTCAP)
        tl.store(out_ptr + tail + lanes, grad.to(out_ptr.dtype.element_ty), mask=mask)
    for step in range(BLOCK_V, tail - start + 1, BLOCK_V):
        x = tl.load(row_ptr + (tail - step) + lanes)
        grad = gradient(x, (tail - step) + lanes == column, lse, gain, smooth, bonus, SOFTCAP)
        tl.store(out_ptr + (tail - step) + lanes, grad.to(out_ptr.dtype.element_ty))
    if not ALIGNED:
        mask = (lanes >= lead) & (lanes < end)
        x = tl.load(row_ptr + lanes, mask=mask, other=0.0)
        grad = gradient(x, lanes == column, lse, gain, smooth, bonus, SOFTCAP)
        tl.store(out_ptr + lanes, grad.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def clear_row(out_ptr, lead, end, ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr):
    """Zeros in the columns lead .. end."""
    lanes = tl.arange(0, BLOCK_V)
    zeros = tl.zeros((BLOCK_V,), tl.float32).to(out_ptr.dtype.element_ty)
    start = 0
    if not ALIGNED:
        tl.store(out_ptr + lanes, zeros, mask=(lanes >= lead) & (lanes < end))
        start = BLOCK_V
    for at in range(start, end - BLOCK_V + 1, BLOCK_V):
        tl.store(out_ptr + at + lanes, zeros)
    tail = end // BLOCK_V * BLOCK_V
    if tail >= start and tail < end:
        tl.store(out_ptr + tail + lanes, zeros, mask=tail + lanes < end)


@triton.jit
def row_place(row, stride, ALIGNED: tl.constexpr):
    """(offset of an aligned address at or before the row, how many elements the row begins after it)."""
    begin = row * stride
    if ALIGNED:
        base, lead = begin, 0
    else:
        base = begin // ALIGNMENT * ALIGNMENT
        lead = (begin - base).to(tl.int32)
    return base, lead


@triton.jit
def forward_kernel(
    logits_ptr, target_ptr, loss_ptr, lse_ptr, scale_ptr, stride, cols, rows, vocab_start, scale_stride,
    IGNORE_INDEX: tl.constexpr, LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,
    STATS: tl.constexpr, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid [rows]; a program owns a row. Reads each logit once, sums in fp32, writes 8 bytes a row.

    STATS: writes a shard's four numbers, 16 bytes a row, to loss_ptr [4, rows]. GRADIENT: reads the row again, from
    L2 as far as it is there, and writes scale * gradient over it.
    """
    row = tl.program_id(0).to(tl.int64)
    base, lead = row_place(row, stride, ALIGNED)
    row_ptr = logits_ptr + base
    end = lead + cols
    target = tl.load(target_ptr + row)
    SMOOTHED: tl.constexpr = LABEL_SMOOTHING != 0.0
    top, total, plain = row_sums(row_ptr, lead, end, SOFTCAP, SMOOTHED, ALIGNED, BLOCK_V)
    # Only now: held through the loop, this would cost the registers that spill.
    local = target - vocab_start
    here = (local >= 0) & (local < cols) & (target != IGNORE_INDEX)
    column = tl.where(here, local, -1 - lead).to(tl.int32) + lead
    at_target = tl.load(row_ptr + column, mask=here, other=0.0).to(tl.float32)
    at_target = tl.where(here, capped(at_target, SOFTCAP), 0.0)
    if STATS:
        tl.store(loss_ptr + row, top)
        tl.store(loss_ptr + rows + row, total)
        tl.store(loss_ptr + 2 * rows + row, at_target)
        tl.store(loss_ptr + 3 * rows + row, plain)
    else:
        lse = top + tl.log(total)
        loss = lse - (1.0 - LABEL_SMOOTHING) * at_target + Z_LOSS * lse * lse
        if SMOOTHED:
            loss -= LABEL_SMOOTHING * plain / cols
        # A GPU cannot raise without waiting: NaN says that a target is no class.
        loss = tl.where(here, loss, tl.where(target == IGNORE_INDEX, 0.0, float("nan")))
        tl.store(loss_ptr + row, loss)
        tl.store(lse_ptr + row, lse)
        if GRADIENT:
            tl.debug_barrier()  # every thread has read the target's logit before one writes it
            if target == IGNORE_INDEX:
                clear_row(row_ptr, lead, end, ALIGNED, BLOCK_V)
            else:
                scale = tl.load(scale_ptr + row * scale_stride).to(tl.float32)
                row_gradient(
                    row_ptr, row_ptr, lead, end, column, lse, scale, cols,
                    LABEL_SMOOTHING, Z_LOSS, SOFTCAP, ALIGNED, BLOCK_V,
                )  # fmt: skip


@triton.jit
def backward_kernel(
    logits_ptr, out_ptr, target_ptr, lse_ptr, scale_ptr,
    stride, out_stride, cols, vocab_start, vocabulary, scale_stride,
    IGNORE_INDEX: tl.constexpr, LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid [rows]; a program owns a row. Reads each logit once and writes its gradient, which may be in its place.

    An ignored row is written and not read. Without ALIGNED both strides are the same, and so are both leads.
    """
    row = tl.program_id(0).to(tl.int64)
    base, lead = row_place(row, stride, ALIGNED)
    out_base = row_place(row, out_stride, ALIGNED)[0]
    end = lead + cols
    target = tl.load(target_ptr + row)
    if target == IGNORE_INDEX:
        clear_row(out_ptr + out_base, lead, end, ALIGNED, BLOCK_V)
    else:
        local = target - vocab_start
        column = tl.where((local >= 0) & (local < cols), local, -1 - lead).to(tl.int32) + lead
        lse = tl.load(lse_ptr + row).to(tl.float32)
        scale = tl.load(scale_ptr + row * scale_stride).to(tl.float32)
        row_gradient(
            logits_ptr + base, out_ptr + out_base, lead, end, column, lse, scale, vocabulary,
            LABEL_SMOOTHING, Z_LOSS, SOFTCAP, ALIGNED, BLOCK_V,
        )  # fmt: skip


def forward(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Backend "triton" of `cross_entropy_fwd`; the row kernel `loss` of the chunk plan."""
    logits = _rows(logits)
    loss, lse = _per_row(logits), _per_row(logits)
    _forward(logits, target, loss, lse, lse, options, start=0, stats=False, gradient=False)
    return loss, lse


def grad_(logits: Tensor, target: Tensor, scale: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Backend "triton" of `cross_entropy_grad_`; the row kernel `loss_and_grad` of the chunk plan."""
    _require_rows(logits)
    loss, lse = _per_row(logits), _per_row(logits)
    _forward(logits, target, loss, lse, scale.contiguous(), options, start=0, stats=False, gradient=True)
    return loss, lse


def stats(logits: Tensor, target: Tensor, start: int, *options: Any) -> Tensor:
    """The row kernel `stats` of the chunk plan."""
    logits = _rows(logits)
    out = logits.new_empty(4, logits.shape[0], dtype=torch.float32)
    _forward(logits, target, out, out, out, options, start=start, stats=True, gradient=False)
    return out


def local(logits: Tensor, target: Tensor, vocab_start: int, valid_rows: int, *options: Any) -> Tensor:
    """Backend "triton" of `cross_entropy_local_fwd`."""
    return stats(_rows(logits)[:, :valid_rows], target, vocab_start, *options)


def backward(dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, *options: Any) -> Tensor:
    """Backend "triton" of `cross_entropy_bwd`."""
    cols = logits.shape[1]
    return local_backward(logits, target, lse, dloss, 0, cols, cols, *options)


def local_backward(
    logits: Tensor, target: Tensor, lse: Tensor, scale: Tensor, vocab_start: int, valid_rows: int, *rest: Any
) -> Tensor:
    """Backend "triton" of `cross_entropy_local_bwd`."""
    dlogits = logits.new_empty(logits.shape)
    _backward(_rows(logits), dlogits, target, lse, scale, vocab_start, valid_rows, *rest)
    return dlogits


def local_backward_(logits: Tensor, *args: Any) -> None:
    """Backend "triton" of `cross_entropy_local_bwd_`."""
    _require_rows(logits)
    _backward(logits, logits, *args)


def grad(
    logits: Tensor, target: Tensor, lse: Tensor, scale: Tensor, start: int, vocabulary: int, *options: Any
) -> None:
    """The row kernel `grad` of the chunk plan."""
    _backward(logits, logits, target, lse, scale, start, logits.shape[1], vocabulary, *options)


def _forward(
    logits: Tensor,
    target: Tensor,
    loss: Tensor,
    lse: Tensor,
    scale: Tensor,
    options: tuple[Any, ...],
    *,
    start: int,
    stats: bool,
    gradient: bool,
) -> None:
    rows, cols = logits.shape
    stride = logits.stride(0)
    launch(
        forward_kernel, (rows,), ROWS.pick(), logits, target.contiguous(), loss, lse, scale,
        stride, cols, rows, start, int(scale.dim() > 0),
        **_constants(options), STATS=stats, GRADIENT=gradient, ALIGNED=_aligned(stride),
    )  # fmt: skip


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
    stride, out_stride = logits.stride(0), out.stride(0)
    if valid < out.shape[1]:
        out[:, valid:] = 0
    launch(
        backward_kernel, (logits.shape[0],), ROWS.pick(), logits, out, target.contiguous(), lse.contiguous(),
        scale.contiguous(), stride, out_stride, valid, start, vocabulary, int(scale.dim() > 0),
        **_constants(options), ALIGNED=stride != out_stride or _aligned(stride),
    )  # fmt: skip


def _aligned(stride: int) -> bool:
    """Whether every row begins where vector loads may; else rows begin with a masked block."""
    return stride % ALIGNMENT.value == 0


def _constants(options: tuple[Any, ...]) -> dict[str, Any]:
    names = ("IGNORE_INDEX", "LABEL_SMOOTHING", "Z_LOSS", "SOFTCAP")
    return dict(zip(names, options, strict=True))


def _rows(logits: Tensor) -> Tensor:
    """Logits whose columns are side by side; the rows may be further apart."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _require_rows(logits: Tensor) -> None:
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits have stride {logits.stride()}: pass contiguous rows, they are overwritten")


def _per_row(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)
