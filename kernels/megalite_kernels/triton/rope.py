"""Rotary embedding of q and k in one launch: out of place, in place, or after an RMSNorm of each head.

A program takes all heads of a token, so that the token's cos and sin are read once and the norm's weights stay in
registers. Pairs of neighbours (interleaved) are read as one contiguous tile and split in registers: loads with a
stride of two would double the transactions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.triton.launch import Launch, Table, launch, num_processors

# 16 heads of 128 bf16 are 4 KiB: two 16-byte loads for each of 128 threads, at 48 registers.
FORWARD = Table("rope_fwd", {"default": Launch({"BLOCK_N": 16}, num_warps=4, num_stages=1)})
# The backward of the norm holds x, dy and the sums of both weights: half the heads keep it at 100 registers.
BACKWARD = Table("rope_norm_bwd", {"default": Launch({"BLOCK_N": 8}, num_warps=4, num_stages=1)})
# Partial sums are [some 500 programs, 2 * D]: 32 columns a program make 8 programs for heads of 128.
WEIGHTS = Table(
    "rope_norm_weights", {"default": Launch({"BLOCK_P": 64, "BLOCK_C": 32}, num_warps=4, num_stages=1)}
)
PROGRAMS_PER_PROCESSOR = 4
"""Of the backward: enough to hide latency at 100 registers and 4 warps; more would only be more partial sums."""


@triton.jit
def load_pairs(
    ptr, offset, mask,
    HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """First and second features of the pairs at offset [BLOCK_N, 1], each fp32 [BLOCK_N, BLOCK_R]."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_R)[None, :]
        x = tl.load(ptr + offset + cols, mask=mask & (cols < 2 * HALF), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (BLOCK_N, BLOCK_R, 2)))
    else:
        cols = tl.arange(0, BLOCK_R)[None, :]
        first = tl.load(ptr + offset + cols, mask=mask & (cols < HALF), other=0.0).to(tl.float32)
        second = tl.load(ptr + offset + HALF + cols, mask=mask & (cols < HALF), other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pairs(
    ptr, offset, mask, first, second,
    HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The reverse of `load_pairs`, rounded to the pointer's dtype."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_R)[None, :]
        x = tl.reshape(tl.join(first, second), (BLOCK_N, 2 * BLOCK_R))
        tl.store(ptr + offset + cols, x.to(ptr.dtype.element_ty), mask=mask & (cols < 2 * HALF))
    else:
        cols = tl.arange(0, BLOCK_R)[None, :]
        tl.store(ptr + offset + cols, first.to(ptr.dtype.element_ty), mask=mask & (cols < HALF))
        tl.store(ptr + offset + HALF + cols, second.to(ptr.dtype.element_ty), mask=mask & (cols < HALF))


@triton.jit
def load_angles(
    cos_ptr, sin_ptr, row,
    HALF: tl.constexpr, BLOCK_R: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Row `row` of the tables, fp32 [1, BLOCK_R]."""
    cols = tl.arange(0, BLOCK_R)[None, :]
    at = row.to(tl.int64) * HALF + cols
    cos = tl.load(cos_ptr + at, mask=cols < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=cols < HALF, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    return cos, sin


@triton.jit
def rotate_heads(
    x_ptr, out_ptr, weight_ptr, rstd_ptr, token, batch, place, cos, sin,
    stride_b, stride_s, stride_n,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_N: tl.constexpr, EPS: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Every head of one token of q or of k."""
    one = tl.zeros((1, 1), tl.int64)
    rest = tl.arange(0, BLOCK_REST)[None, :]
    if NORM:
        gain_first, gain_second = load_pairs(weight_ptr, one, one == 0, HALF, BLOCK_R, 1, INTERLEAVED)
        gain_rest = tl.load(weight_ptr + 2 * HALF + rest, mask=rest < DIM - 2 * HALF, other=0.0).to(
            tl.float32
        )
    for start in range(0, HEADS, BLOCK_N):
        head = start + tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
        mask = head < HEADS
        rest_mask = mask & (rest < DIM - 2 * HALF)
        source = batch * stride_b + place * stride_s + head * stride_n
        first, second = load_pairs(x_ptr, source, mask, HALF, BLOCK_R, BLOCK_N, INTERLEAVED)
        if NORM:
            squares = tl.sum(first * first + second * second, 1)
            if DIM > 2 * HALF:
                kept = tl.load(x_ptr + source + 2 * HALF + rest, mask=rest_mask, other=0.0).to(tl.float32)
                squares += tl.sum(kept * kept, 1)
            rstd = tl.rsqrt(squares / DIM + EPS)[:, None]
            tl.store(rstd_ptr + token * HEADS + head, rstd, mask=mask)
            first, second = first * rstd * gain_first, second * rstd * gain_second
        if IN_PLACE:
            # Two threads may hold copies of one element: all have read before the first writes.
            tl.debug_barrier()
            target = source
        else:
            target = (token * HEADS + head) * DIM
        turned, turned_second = first * cos - second * sin, second * cos + first * sin
        store_pairs(out_ptr, target, mask, turned, turned_second, HALF, BLOCK_R, BLOCK_N, INTERLEAVED)
        if DIM > 2 * HALF:
            if NORM:
                kept = kept * rstd * gain_rest
                tl.store(
                    out_ptr + target + 2 * HALF + rest, kept.to(out_ptr.dtype.element_ty), mask=rest_mask
                )
            elif not IN_PLACE:
                bits = tl.load(x_ptr + source + 2 * HALF + rest, mask=rest_mask)
                tl.store(out_ptr + target + 2 * HALF + rest, bits, mask=rest_mask)


@triton.jit
def rotate_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_norm_ptr, k_norm_ptr,
    q_rstd_ptr, k_rstd_ptr, cos_ptr, sin_ptr, sequence,
    q_stride_b, q_stride_s, q_stride_n, k_stride_b, k_stride_s, k_stride_n,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr, EPS: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    SHARED_TABLE: tl.constexpr, Q_LIMIT: tl.constexpr, K_LIMIT: tl.constexpr, NORM: tl.constexpr,
    IN_PLACE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid [tokens]; a program owns all heads of a token's q and k.

    Reads (N + K) D elements and the token's R/2 of cos and sin, writes (N + K) D elements (in place only the R
    that turn), with the norm also 4 (N + K) bytes of rstd. Computed in fp32, rounded once.
    """
    program = tl.program_id(0)  # divided as 32 bits, which takes a third of the instructions of 64
    token, batch, place = (
        program.to(tl.int64),
        (program // sequence).to(tl.int64),
        (program % sequence).to(tl.int64),
    )
    cos, sin = load_angles(cos_ptr, sin_ptr, place if SHARED_TABLE else token, HALF, BLOCK_R, INVERSE)
    rotate_heads(
        q_ptr, q_out_ptr, q_norm_ptr, q_rstd_ptr, token, batch, place, cos, sin, q_stride_b, q_stride_s, q_stride_n,
        Q_HEADS, DIM, HALF, BLOCK_R, BLOCK_REST, BLOCK_N if BLOCK_N < Q_LIMIT else Q_LIMIT,
        EPS, INTERLEAVED, NORM, IN_PLACE,
    )  # fmt: skip
    rotate_heads(
        k_ptr, k_out_ptr, k_norm_ptr, k_rstd_ptr, token, batch, place, cos, sin, k_stride_b, k_stride_s, k_stride_n,
        K_HEADS, DIM, HALF, BLOCK_R, BLOCK_REST, BLOCK_N if BLOCK_N < K_LIMIT else K_LIMIT,
        EPS, INTERLEAVED, NORM, IN_PLACE,
    )  # fmt: skip


@triton.jit
def heads_backward(
    dy_ptr, x_ptr, dx_ptr, weight_ptr, rstd_ptr, token, batch, place, cos, sin,
    dy_stride_b, dy_stride_s, dy_stride_n, stride_b, stride_s, stride_n,
    sum_first, sum_second, sum_rest,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_N: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Every head of one token of q or of k: writes dx, returns the sums of dweight with this token's added."""
    one = tl.zeros((1, 1), tl.int64)
    rest = tl.arange(0, BLOCK_REST)[None, :]
    gain_first, gain_second = load_pairs(weight_ptr, one, one == 0, HALF, BLOCK_R, 1, INTERLEAVED)
    gain_rest = tl.load(weight_ptr + 2 * HALF + rest, mask=rest < DIM - 2 * HALF, other=0.0).to(tl.float32)
    for start in range(0, HEADS, BLOCK_N):
        head = start + tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
        mask = head < HEADS
        rest_mask = mask & (rest < DIM - 2 * HALF)
        source = batch * stride_b + place * stride_s + head * stride_n
        dy_source = batch * dy_stride_b + place * dy_stride_s + head * dy_stride_n
        first, second = load_pairs(x_ptr, source, mask, HALF, BLOCK_R, BLOCK_N, INTERLEAVED)
        dfirst, dsecond = load_pairs(dy_ptr, dy_source, mask, HALF, BLOCK_R, BLOCK_N, INTERLEAVED)
        rstd = tl.load(rstd_ptr + token * HEADS + head, mask=mask, other=0.0)
        first, second = first * rstd, second * rstd
        g_first, g_second = dfirst * cos - dsecond * sin, dsecond * cos + dfirst * sin
        sum_first += g_first * first
        sum_second += g_second * second
        g_first, g_second = g_first * gain_first, g_second * gain_second
        dot = tl.sum(g_first * first + g_second * second, 1)
        if DIM > 2 * HALF:
            kept = tl.load(x_ptr + source + 2 * HALF + rest, mask=rest_mask, other=0.0).to(tl.float32) * rstd
            g_rest = tl.load(dy_ptr + dy_source + 2 * HALF + rest, mask=rest_mask, other=0.0).to(tl.float32)
            sum_rest += g_rest * kept
            g_rest *= gain_rest
            dot += tl.sum(g_rest * kept, 1)
        mean = (dot / DIM)[:, None]
        target = (token * HEADS + head) * DIM
        dx_first, dx_second = rstd * (g_first - first * mean), rstd * (g_second - second * mean)
        store_pairs(dx_ptr, target, mask, dx_first, dx_second, HALF, BLOCK_R, BLOCK_N, INTERLEAVED)
        if DIM > 2 * HALF:
            dx_rest = (rstd * (g_rest - kept * mean)).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + target + 2 * HALF + rest, dx_rest, mask=rest_mask)
    return sum_first, sum_second, sum_rest


@triton.jit
def store_sums(
    ptr, first, second, rest_sum,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Sum over the tiles' heads, into [DIM] at ptr."""
    one = tl.zeros((1, 1), tl.int64)
    first, second = tl.sum(first, 0)[None, :], tl.sum(second, 0)[None, :]
    store_pairs(ptr, one, one == 0, first, second, HALF, BLOCK_R, 1, INTERLEAVED)
    if DIM > 2 * HALF:
        rest = tl.arange(0, BLOCK_REST)
        tl.store(ptr + 2 * HALF + rest, tl.sum(rest_sum, 0), mask=rest < DIM - 2 * HALF)


@triton.jit
def norm_backward_kernel(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, dq_ptr, dk_ptr, q_norm_ptr, k_norm_ptr,
    q_rstd_ptr, k_rstd_ptr, cos_ptr, sin_ptr, partial_ptr,
    tokens, sequence,
    dq_stride_b, dq_stride_s, dq_stride_n, dk_stride_b, dk_stride_s, dk_stride_n,
    q_stride_b, q_stride_s, q_stride_n, k_stride_b, k_stride_s, k_stride_n,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr, SHARED_TABLE: tl.constexpr, Q_LIMIT: tl.constexpr,
    K_LIMIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid [programs]; a program owns every programs-th token, and the sums of dweight over them.

    Reads dy and x, writes dx, (N + K) D elements each, reads 4 (N + K) bytes of rstd and the token's cos and sin;
    at its end writes 2 D fp32 of partial sums. Computed in fp32.
    """
    Q_BLOCK: tl.constexpr = BLOCK_N if BLOCK_N < Q_LIMIT else Q_LIMIT
    K_BLOCK: tl.constexpr = BLOCK_N if BLOCK_N < K_LIMIT else K_LIMIT
    q_first, q_second = tl.zeros((Q_BLOCK, BLOCK_R), tl.float32), tl.zeros((Q_BLOCK, BLOCK_R), tl.float32)
    k_first, k_second = tl.zeros((K_BLOCK, BLOCK_R), tl.float32), tl.zeros((K_BLOCK, BLOCK_R), tl.float32)
    q_rest, k_rest = tl.zeros((Q_BLOCK, BLOCK_REST), tl.float32), tl.zeros((K_BLOCK, BLOCK_REST), tl.float32)
    program, step = tl.program_id(0), tl.num_programs(0)
    for turn in range(tl.cdiv(tokens - program, step)):
        at = program + turn * step
        token = at.to(tl.int64)
        batch, place = (at // sequence).to(tl.int64), (at % sequence).to(tl.int64)
        cos, sin = load_angles(cos_ptr, sin_ptr, place if SHARED_TABLE else token, HALF, BLOCK_R, True)
        q_first, q_second, q_rest = heads_backward(
            dq_out_ptr, q_ptr, dq_ptr, q_norm_ptr, q_rstd_ptr, token, batch, place, cos, sin,
            dq_stride_b, dq_stride_s, dq_stride_n, q_stride_b, q_stride_s, q_stride_n, q_first, q_second, q_rest,
            Q_HEADS, DIM, HALF, BLOCK_R, BLOCK_REST, Q_BLOCK, INTERLEAVED,
        )  # fmt: skip
        k_first, k_second, k_rest = heads_backward(
            dk_out_ptr, k_ptr, dk_ptr, k_norm_ptr, k_rstd_ptr, token, batch, place, cos, sin,
            dk_stride_b, dk_stride_s, dk_stride_n, k_stride_b, k_stride_s, k_stride_n, k_first, k_second, k_rest,
            K_HEADS, DIM, HALF, BLOCK_R, BLOCK_REST, K_BLOCK, INTERLEAVED,
        )  # fmt: skip
    partial_ptr += program.to(tl.int64) * 2 * DIM
    store_sums(partial_ptr, q_first, q_second, q_rest, DIM, HALF, BLOCK_R, BLOCK_REST, INTERLEAVED)
    store_sums(partial_ptr + DIM, k_first, k_second, k_rest, DIM, HALF, BLOCK_R, BLOCK_REST, INTERLEAVED)


@triton.jit
def weights_kernel(
    partial_ptr, dq_norm_ptr, dk_norm_ptr, programs,
    DIM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid [columns / BLOCK_C]; a program owns some of the 2 D columns of partial [programs, 2 D].

    Reads 8 D bytes a row; sums in fp32, in an order that depends on the number of programs only.
    """
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, programs, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (rows < programs) & (cols < 2 * DIM)[None, :]
        total += tl.load(partial_ptr + rows * 2 * DIM + cols[None, :], mask=mask, other=0.0)
    sums = tl.sum(total, 0)
    tl.store(dq_norm_ptr + cols, sums.to(dq_norm_ptr.dtype.element_ty), mask=cols < DIM)
    at_k = (cols >= DIM) & (cols < 2 * DIM)
    tl.store(dk_norm_ptr + cols - DIM, sums.to(dk_norm_ptr.dtype.element_ty), mask=at_k)


def _by_token(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x [.., N, D] with neighbouring features, copied only if they aren't, and its strides by (batch, place, head)."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x, (x.stride(0) if x.dim() == 4 else 0, x.stride(-3), x.stride(-2))


def _shape_options(q: Tensor, k: Tensor, cos: Tensor) -> dict[str, int]:
    dim, half = q.shape[-1], cos.shape[-1]
    return {
        "SHARED_TABLE": cos.shape[:-1].numel() != q.shape[:-2].numel(),
        "Q_LIMIT": triton.next_power_of_2(max(q.shape[-2], 1)),
        "K_LIMIT": triton.next_power_of_2(max(k.shape[-2], 1)),
        "Q_HEADS": q.shape[-2],
        "K_HEADS": k.shape[-2],
        "DIM": dim,
        "HALF": half,
        "BLOCK_R": triton.next_power_of_2(max(half, 1)),
        "BLOCK_REST": triton.next_power_of_2(max(dim - 2 * half, 1)),
    }


def _rotate(
    q: Tensor,
    k: Tensor,
    outputs: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    interleaved: bool,
    inverse: bool,
    in_place: bool,
) -> None:
    (q, q_strides), (k, k_strides) = _by_token(q), _by_token(k)
    cos, sin = cos.contiguous(), sin.contiguous()
    launch(
        rotate_kernel,
        (q.shape[:-2].numel(),),
        FORWARD.pick(),
        q, k, *outputs, *((q, k, cos, sin) if norm is None else norm), cos, sin,  # without norms placeholders
        q.shape[-3], *q_strides, *k_strides,
        **_shape_options(q, k, cos), EPS=eps, INTERLEAVED=interleaved, INVERSE=inverse,
        NORM=norm is not None, IN_PLACE=in_place,
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Backend "triton" of `rope_fwd`; q and k may be views into one projection."""
    outputs = q.new_empty(q.shape), k.new_empty(k.shape)
    options = {"interleaved": interleaved, "inverse": inverse, "in_place": False}
    _rotate(q, k, outputs, None, cos, sin, eps=0.0, **options)
    return outputs


def forward_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> None:
    """Backend "triton" of `rope_`; features that are not neighbours take a copy and back."""
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in (q, k)):
        for x, turned in zip((q, k), forward(q, k, cos, sin, interleaved, inverse), strict=True):
            x.copy_(turned)
        return
    options = {"interleaved": interleaved, "inverse": inverse, "in_place": True}
    _rotate(q, k, (q, k), None, cos, sin, eps=0.0, **options)


def norm_forward(
    q: Tensor,
    k: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backend "triton" of `rope_norm_fwd`."""
    outputs = q.new_empty(q.shape), k.new_empty(k.shape)
    q_rstd, k_rstd = (x.new_empty(x.shape[:-1].numel(), dtype=torch.float32) for x in (q, k))
    norm = q_norm.contiguous(), k_norm.contiguous(), q_rstd, k_rstd
    options = {"interleaved": interleaved, "inverse": False, "in_place": False}
    _rotate(q, k, outputs, norm, cos, sin, eps=eps, **options)
    return *outputs, q_rstd, k_rstd


def norm_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor,
    q_rstd: Tensor, k_rstd: Tensor, cos: Tensor, sin: Tensor, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Backend "triton" of `rope_norm_bwd`."""
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dq_norm, dk_norm = torch.empty_like(q_norm), torch.empty_like(k_norm)
    tokens = q.shape[:-2].numel()
    programs = min(tokens, PROGRAMS_PER_PROCESSOR * num_processors(q))
    partial = q.new_empty((programs, 2, q.shape[-1]), dtype=torch.float32)
    inputs, strides = zip(*(_by_token(x) for x in (dq_out, dk_out, q, k)), strict=True)
    cos, sin = cos.contiguous(), sin.contiguous()
    launch(
        norm_backward_kernel,
        (programs,),
        BACKWARD.pick(),
        *inputs, dq, dk, q_norm.contiguous(), k_norm.contiguous(), q_rstd, k_rstd, cos, sin, partial,
        tokens, q.shape[-3], *(step for group in strides for step in group),
        **_shape_options(q, k, cos), INTERLEAVED=interleaved,
    )  # fmt: skip
    config = WEIGHTS.pick()
    grid = (triton.cdiv(2 * q.shape[-1], config.blocks["BLOCK_C"]),)
    launch(weights_kernel, grid, config, partial, dq_norm, dk_norm, programs, DIM=q.shape[-1])
    return dq, dk, dq_norm, dk_norm
