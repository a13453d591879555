"""Attention backward in three kernels without atomics: the same bits in every run.

With P the probabilities and delta = rowsum(dO * O) - dlse: dV = P'dO, dS = P * (dO V' - delta), dQ = dS K * scale,
dK = dS'Q * scale. The scores are recomputed from q, k and lse, once where key blocks are owned (dk, dv) and once where
query blocks are (dq): 14 * D FLOPs per query head and visible pair instead of 10 * D, and no sum whose order depends
on the machine. Source: Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megalite_kernels.triton.attention_common import (
    LOG2E,
    capped,
    document,
    key_range,
    load_tile,
    masked,
    owned_tile,
    query_range,
    store_tile,
)


@triton.jit
def load_statistics(lse_ptr, delta_ptr, rows, BLOCK_M: tl.constexpr):
    """(lse in base 2, delta) of a block; +inf, and with it probabilities of 0, for a row that sees no key or isn't."""
    row = tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + row, mask=row < rows, other=float("inf"))
    delta = tl.load(delta_ptr + row, mask=row < rows, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), delta


@triton.jit(do_not_specialize=["tokens", "blocks"])
def attention_delta_kernel(
    dout_ptr, out_ptr, lse_ptr, dlse_ptr, sinks_ptr, delta_ptr, partial_ptr,
    dout_stride_b, dout_stride_t, dout_stride_h, out_stride_b, out_stride_t, out_stride_h, tokens, heads, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid [batch * blocks * heads]; a program owns BLOCK_T tokens of one head.

    delta = rowsum(dout * out) - dlse, and the share of these tokens in dsinks = -sum(exp(sink - lse) * delta), which
    the launcher adds up in a fixed order. Reads dout and out, writes delta: 2 * N * D * element size + 4 * N bytes per
    token, 4 * N more for dlse and for sinks each; sums in fp32.
    """
    program = tl.program_id(0)
    head = program % heads
    start = program // heads % blocks * BLOCK_T
    batch = tl.cast(program // heads // blocks, tl.int64)
    first = tl.cast(start, tl.int64)
    dout_base = (
        dout_ptr + batch * dout_stride_b + first * dout_stride_t + tl.cast(head, tl.int64) * dout_stride_h
    )
    out_base = out_ptr + batch * out_stride_b + first * out_stride_t + tl.cast(head, tl.int64) * out_stride_h
    dout = load_tile(dout_base, dout_stride_t, tokens - start, 0, D, BLOCK_T, BLOCK_D, True).to(tl.float32)
    out = load_tile(out_base, out_stride_t, tokens - start, 0, D, BLOCK_T, BLOCK_D, True).to(tl.float32)
    delta = tl.sum(dout * out, 1)
    at = tl.arange(0, BLOCK_T)
    row = (batch * heads + head) * tokens + first + at
    there = at < tokens - start
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, mask=there, other=0.0)
    tl.store(delta_ptr + row, delta, mask=there)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        lse = tl.load(lse_ptr + row, mask=there, other=float("inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        share = tl.exp2((sink - lse) * LOG2E)
        tl.store(partial_ptr + program, -tl.sum(tl.where(share > 0.0, share * delta, 0.0), 0))


@triton.jit
def gather_dk_dv(
    dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q_base, q_stride_t, q_stride_h, dout_base, dout_stride_t,
    dout_stride_h, lse_base, delta_base, statistics_stride, key, rows, shift, window, groups, first, last,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BEFORE: tl.constexpr, CAP: tl.constexpr, FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the query blocks from first to last of every head of the group give, in one loop that is pipelined
    across heads. Scores stand transposed, [keys, queries], so that probabilities and their gradients are left
    operands, straight from registers."""
    count = tl.cdiv(tl.maximum(last - first, 0), BLOCK_M)
    for index in tl.range(0, groups * count):
        member = index // count
        start = first + (index - member * count) * BLOCK_M
        q_rows = q_base + tl.cast(start, tl.int64) * q_stride_t + tl.cast(member, tl.int64) * q_stride_h
        dout_rows = (
            dout_base + tl.cast(start, tl.int64) * dout_stride_t + tl.cast(member, tl.int64) * dout_stride_h
        )
        statistic = tl.cast(member, tl.int64) * statistics_stride + start
        left = rows - start
        lse, delta = load_statistics(lse_base + statistic, delta_base + statistic, left, BLOCK_M)
        q = load_tile(q_rows, q_stride_t, left, 0, D, BLOCK_M, D1, MASKED)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if D2:
            q_tail = load_tile(q_rows, q_stride_t, left, D1, D, BLOCK_M, D2, MASKED)
            scores = tl.dot(k_tail, tl.trans(q_tail), scores, input_precision=PRECISION)
        scores, bent = capped(scores, BEFORE, CAP, k.dtype == tl.float32)
        if MASKED:
            position = start + tl.arange(0, BLOCK_M) + shift
            scores = masked(scores, position[None, :], key[:, None], 0x7FFFFFFF, window, CAUSAL, WINDOWED)
        probabilities = tl.exp2(scores * FACTOR - lse[None, :])
        dout = load_tile(dout_rows, dout_stride_t, left, 0, D, BLOCK_M, D1, MASKED)
        dv = tl.dot(probabilities.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dscores = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        if D2:
            dout_tail = load_tile(dout_rows, dout_stride_t, left, D1, D, BLOCK_M, D2, MASKED)
            dv_tail = tl.dot(probabilities.to(dout.dtype), dout_tail, dv_tail, input_precision=PRECISION)
            dscores = tl.dot(v_tail, tl.trans(dout_tail), dscores, input_precision=PRECISION)
        dscores = probabilities * (dscores - delta[None, :])
        if CAP > 0.0:
            dscores = dscores * (1.0 - bent * bent)
        dscores = dscores.to(q.dtype)
        dk = tl.dot(dscores, q, dk, input_precision=PRECISION)
        if D2:
            dk_tail = tl.dot(dscores, q_tail, dk_tail, input_precision=PRECISION)
    return dk, dk_tail, dv, dv_tail


@triton.jit(do_not_specialize=["q_len", "k_len", "window", "offset", "blocks", "sequences", "section"])
def attention_dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    dout_stride_b, dout_stride_t, dout_stride_h,
    q_len, k_len, window, offset, kv_heads, groups, blocks, sequences, section,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
    BEFORE: tl.constexpr, CAP: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, SCALE: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid [blocks * kv_heads * sequences]; a program owns BLOCK_N keys of one key head, and adds up the queries of
    all its query heads in order.

    Reads k, v once and q, dout, lse, delta once per key block; writes dk, dv. FLOPs: 8 * D per query head and pair.
    Scores and sums are fp32; probabilities and their gradients are rounded to the tensors' dtype for the products.
    """
    block, kv_head, sequence = owned_tile(blocks, kv_heads, sequences, section, False)
    batch, q_start, rows, k_start, keys = document(cu_q_ptr, cu_k_ptr, sequence, q_len, k_len, PACKED)
    start = block * BLOCK_N
    if start >= keys:
        return
    shift = keys - rows + offset
    key = start + tl.arange(0, BLOCK_N)
    batch = tl.cast(batch, tl.int64)
    k_token = tl.cast(k_start + start, tl.int64)
    q_token = tl.cast(q_start, tl.int64)
    k_base = k_ptr + batch * k_stride_b + k_token * k_stride_t + tl.cast(kv_head, tl.int64) * k_stride_h
    v_base = v_ptr + batch * v_stride_b + k_token * v_stride_t + tl.cast(kv_head, tl.int64) * v_stride_h
    k = load_tile(k_base, k_stride_t, keys - start, 0, D, BLOCK_N, D1, True)
    v = load_tile(v_base, v_stride_t, keys - start, 0, D, BLOCK_N, D1, True)
    k_tail, v_tail = k, v
    if D2:
        k_tail = load_tile(k_base, k_stride_t, keys - start, D1, D, BLOCK_N, D2, True)
        v_tail = load_tile(v_base, v_stride_t, keys - start, D1, D, BLOCK_N, D2, True)
    first, full_first, full_last, last = query_range(
        start, tl.minimum(BLOCK_N, keys - start), shift, rows, window, CAUSAL, WINDOWED, BLOCK_M
    )
    dk = tl.zeros((BLOCK_N, D1), tl.float32)
    dv = tl.zeros((BLOCK_N, D1), tl.float32)
    dk_tail = tl.zeros((BLOCK_N, D2 if D2 else 1), tl.float32)
    dv_tail = tl.zeros((BLOCK_N, D2 if D2 else 1), tl.float32)
    head = kv_head * groups
    q_base = q_ptr + batch * q_stride_b + q_token * q_stride_t + tl.cast(head, tl.int64) * q_stride_h
    dout_base = (
        dout_ptr + batch * dout_stride_b + q_token * dout_stride_t + tl.cast(head, tl.int64) * dout_stride_h
    )
    statistic = (batch * kv_heads * groups + head) * q_len + q_token
    if CAUSAL or WINDOWED:
        dk, dk_tail, dv, dv_tail = gather_dk_dv(
            dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q_base, q_stride_t, q_stride_h, dout_base, dout_stride_t,
            dout_stride_h, lse_ptr + statistic, delta_ptr + statistic, q_len, key, rows, shift, window, groups,
            first, full_first,
            CAUSAL, WINDOWED, BEFORE, CAP, FACTOR, PRECISION, D, D1, D2, BLOCK_M, True,
        )  # fmt: skip
    dk, dk_tail, dv, dv_tail = gather_dk_dv(
        dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q_base, q_stride_t, q_stride_h, dout_base, dout_stride_t,
        dout_stride_h, lse_ptr + statistic, delta_ptr + statistic, q_len, key, rows, shift, window, groups,
        full_first, full_last,
        CAUSAL, WINDOWED, BEFORE, CAP, FACTOR, PRECISION, D, D1, D2, BLOCK_M, False,
    )  # fmt: skip
    dk, dk_tail, dv, dv_tail = gather_dk_dv(
        dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q_base, q_stride_t, q_stride_h, dout_base, dout_stride_t,
        dout_stride_h, lse_ptr + statistic, delta_ptr + statistic, q_len, key, rows, shift, window, groups,
        full_last, last,
        CAUSAL, WINDOWED, BEFORE, CAP, FACTOR, PRECISION, D, D1, D2, BLOCK_M, True,
    )  # fmt: skip
    at = ((batch * k_len + k_token) * kv_heads + kv_head) * D
    store_tile(dk_ptr + at, kv_heads * D, keys - start, dk * SCALE, 0, D, BLOCK_N, D1)
    store_tile(dv_ptr + at, kv_heads * D, keys - start, dv, 0, D, BLOCK_N, D1)
    if D2:
        store_tile(dk_ptr + at, kv_heads * D, keys - start, dk_tail * SCALE, D1, D, BLOCK_N, D2)
        store_tile(dv_ptr + at, kv_heads * D, keys - start, dv_tail, D1, D, BLOCK_N, D2)


@triton.jit
def gather_dq(
    dq, dq_tail, q, q_tail, dout, dout_tail, lse, delta, position, k_base, k_stride, v_base, v_stride, k_len, window,
    first, last,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BEFORE: tl.constexpr, CAP: tl.constexpr, FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the key blocks from first to last give."""
    for start in tl.range(first, last, BLOCK_N):
        k_rows = k_base + tl.cast(start, tl.int64) * k_stride
        v_rows = v_base + tl.cast(start, tl.int64) * v_stride
        left = k_len - start
        k = load_tile(k_rows, k_stride, left, 0, D, BLOCK_N, D1, MASKED)
        v = load_tile(v_rows, v_stride, left, 0, D, BLOCK_N, D1, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dscores = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if D2:
            k_tail = load_tile(k_rows, k_stride, left, D1, D, BLOCK_N, D2, MASKED)
            v_tail = load_tile(v_rows, v_stride, left, D1, D, BLOCK_N, D2, MASKED)
            scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
            dscores = tl.dot(dout_tail, tl.trans(v_tail), dscores, input_precision=PRECISION)
        scores, bent = capped(scores, BEFORE, CAP, q.dtype == tl.float32)
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)
            scores = masked(scores, position[:, None], key[None, :], k_len, window, CAUSAL, WINDOWED)
        dscores = tl.exp2(scores * FACTOR - lse[:, None]) * (dscores - delta[:, None])
        if CAP > 0.0:
            dscores = dscores * (1.0 - bent * bent)
        dscores = dscores.to(k.dtype)
        dq = tl.dot(dscores, k, dq, input_precision=PRECISION)
        if D2:
            dq_tail = tl.dot(dscores, k_tail, dq_tail, input_precision=PRECISION)
    return dq, dq_tail


@triton.jit(do_not_specialize=["q_len", "k_len", "window", "offset", "blocks", "sequences", "section"])
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    dout_stride_b, dout_stride_t, dout_stride_h,
    q_len, k_len, window, offset, heads, groups, blocks, sequences, section,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
    BEFORE: tl.constexpr, CAP: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, SCALE: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid [blocks * heads * sequences]; a program owns BLOCK_M queries of one head.

    Reads q, dout, lse, delta once and k, v once per query block; writes dq. FLOPs: 6 * D per query head and pair.
    Scores and sums are fp32; gradients of scores are rounded to the tensors' dtype for the last product.
    """
    block, head, sequence = owned_tile(blocks, heads, sequences, section, CAUSAL)
    batch, q_start, rows, k_start, keys = document(cu_q_ptr, cu_k_ptr, sequence, q_len, k_len, PACKED)
    row = block * BLOCK_M
    if row >= rows:
        return
    shift = keys - rows + offset
    position = row + tl.arange(0, BLOCK_M) + shift
    batch = tl.cast(batch, tl.int64)
    token = tl.cast(q_start + row, tl.int64)
    q_base = q_ptr + batch * q_stride_b + token * q_stride_t + tl.cast(head, tl.int64) * q_stride_h
    dout_base = (
        dout_ptr + batch * dout_stride_b + token * dout_stride_t + tl.cast(head, tl.int64) * dout_stride_h
    )
    q = load_tile(q_base, q_stride_t, rows - row, 0, D, BLOCK_M, D1, True)
    dout = load_tile(dout_base, dout_stride_t, rows - row, 0, D, BLOCK_M, D1, True)
    q_tail, dout_tail = q, dout
    if D2:
        q_tail = load_tile(q_base, q_stride_t, rows - row, D1, D, BLOCK_M, D2, True)
        dout_tail = load_tile(dout_base, dout_stride_t, rows - row, D1, D, BLOCK_M, D2, True)
    at = (batch * heads + head) * q_len + token
    lse, delta = load_statistics(lse_ptr + at, delta_ptr + at, rows - row, BLOCK_M)
    k_base = (
        k_ptr
        + batch * k_stride_b
        + tl.cast(k_start, tl.int64) * k_stride_t
        + tl.cast(head // groups, tl.int64) * k_stride_h
    )
    v_base = (
        v_ptr
        + batch * v_stride_b
        + tl.cast(k_start, tl.int64) * v_stride_t
        + tl.cast(head // groups, tl.int64) * v_stride_h
    )
    first, full_first, full_last, last = key_range(
        row, tl.minimum(BLOCK_M, rows - row), shift, keys, window, CAUSAL, WINDOWED, BLOCK_N
    )
    dq = tl.zeros((BLOCK_M, D1), tl.float32)
    dq_tail = tl.zeros((BLOCK_M, D2 if D2 else 1), tl.float32)
    if WINDOWED:
        dq, dq_tail = gather_dq(
            dq, dq_tail, q, q_tail, dout, dout_tail, lse, delta, position, k_base, k_stride_t, v_base, v_stride_t,
            keys, window, first, full_first,
            CAUSAL, WINDOWED, BEFORE, CAP, FACTOR, PRECISION, D, D1, D2, BLOCK_N, True,
        )  # fmt: skip
    dq, dq_tail = gather_dq(
        dq, dq_tail, q, q_tail, dout, dout_tail, lse, delta, position, k_base, k_stride_t, v_base, v_stride_t,
        keys, window, full_first, full_last,
        CAUSAL, WINDOWED, BEFORE, CAP, FACTOR, PRECISION, D, D1, D2, BLOCK_N, False,
    )  # fmt: skip
    dq, dq_tail = gather_dq(
        dq, dq_tail, q, q_tail, dout, dout_tail, lse, delta, position, k_base, k_stride_t, v_base, v_stride_t,
        keys, window, full_last, last,
        CAUSAL, WINDOWED, BEFORE, CAP, FACTOR, PRECISION, D, D1, D2, BLOCK_N, True,
    )  # fmt: skip
    dq_base = dq_ptr + ((batch * q_len + token) * heads + head) * D
    store_tile(dq_base, heads * D, rows - row, dq * SCALE, 0, D, BLOCK_M, D1)
    if D2:
        store_tile(dq_base, heads * D, rows - row, dq_tail * SCALE, D1, D, BLOCK_M, D2)
