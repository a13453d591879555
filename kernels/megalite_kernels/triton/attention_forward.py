"""Attention forward with pointers: every GPU, every stride, every option.

One program reads a block of queries once and passes over the key blocks that it sees, keeping the running maximum,
sum and output of the softmax (Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018; Dao,
"FlashAttention-2", 2023). Grouped key heads are addressed, never repeated.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megalite_kernels.triton.attention_common import (
    LN2,
    LOG2E,
    capped,
    document,
    key_range,
    load_tile,
    masked,
    owned_tile,
    store_tile,
)


@triton.jit
def softmax_start(sinks_ptr, head, BLOCK_M: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """(output, its tail, maximum, total) before the first key: a sink is a logit already seen, with no value."""
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        maximum = tl.zeros((BLOCK_M,), tl.float32) + sink
        total += tl.where(sink == float("-inf"), 0.0, 1.0)
    acc = tl.zeros((BLOCK_M, D1), tl.float32)
    tail = tl.zeros((BLOCK_M, D2 if D2 else 1), tl.float32)
    return acc, tail, maximum, total


@triton.jit
def softmax_step(scores, maximum, total, FACTOR: tl.constexpr, MASKED: tl.constexpr):
    """(probabilities relative to the new maximum, factor for what was summed before, maximum, total)."""
    newest = tl.maximum(maximum, tl.max(scores, 1) * FACTOR)
    finite = newest
    if MASKED:  # a row that has seen no key yet: exp2(-inf - 0) is the 0 that exp2(-inf + inf) is not
        finite = tl.where(newest == float("-inf"), 0.0, newest)
    probabilities = tl.exp2(scores * FACTOR - finite[:, None])
    correction = tl.exp2(maximum - finite)
    return probabilities, correction, newest, total * correction + tl.sum(probabilities, 1)


@triton.jit
def softmax_end(maximum, total):
    """(what the output is divided by, natural log-sum-exp)."""
    divisor = tl.where(total == 0.0, 1.0, total)
    return divisor, tl.where(total == 0.0, float("-inf"), (maximum + tl.log2(divisor)) * LN2)


@triton.jit
def attend(
    acc, tail, maximum, total, q, q_tail, position, k_base, k_stride, v_base, v_stride, k_len, window, first, last,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BEFORE: tl.constexpr, CAP: tl.constexpr, FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The state after the key blocks from first to last; with MASKED any of them may be seen in part."""
    for start in tl.range(first, last, BLOCK_N):
        k_rows = k_base + tl.cast(start, tl.int64) * k_stride
        v_rows = v_base + tl.cast(start, tl.int64) * v_stride
        left = k_len - start
        k = load_tile(k_rows, k_stride, left, 0, D, BLOCK_N, D1, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if D2:
            k_tail = load_tile(k_rows, k_stride, left, D1, D, BLOCK_N, D2, MASKED)
            scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
        scores, _ = capped(scores, BEFORE, CAP, q.dtype == tl.float32)
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)
            scores = masked(scores, position[:, None], key[None, :], k_len, window, CAUSAL, WINDOWED)
        probabilities, correction, maximum, total = softmax_step(scores, maximum, total, FACTOR, MASKED)
        narrow = probabilities.to(q.dtype)
        v = load_tile(v_rows, v_stride, left, 0, D, BLOCK_N, D1, MASKED)
        acc = tl.dot(narrow, v, acc * correction[:, None], input_precision=PRECISION)
        if D2:
            v_tail = load_tile(v_rows, v_stride, left, D1, D, BLOCK_N, D2, MASKED)
            tail = tl.dot(narrow, v_tail, tail * correction[:, None], input_precision=PRECISION)
    return acc, tail, maximum, total


@triton.jit(do_not_specialize=["q_len", "k_len", "window", "offset", "blocks", "sequences", "section"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    q_len, k_len, window, offset, heads, groups, blocks, sequences, section,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
    BEFORE: tl.constexpr, CAP: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid [blocks * heads * sequences]; a program owns BLOCK_M queries of one head.

    Reads q once, k and v once per query block (once per section and wave from memory, the rest hits the L2 cache);
    writes out and 4 bytes of lse per row: (2 * N + 2 * K) * D * element size + 4 * N bytes per token at the least.
    FLOPs: 4 * D per query head and visible pair. Scores, softmax and output are fp32, both products take the
    tensors' dtype.
    """
    block, head, sequence = owned_tile(blocks, heads, sequences, section, CAUSAL)
    batch, q_start, rows, k_start, keys = document(cu_q_ptr, cu_k_ptr, sequence, q_len, k_len, PACKED)
    row = block * BLOCK_M
    if row >= rows:
        return
    shift = keys - rows + offset
    position = row + tl.arange(0, BLOCK_M) + shift
    first_token = tl.cast(q_start + row, tl.int64)
    batch = tl.cast(batch, tl.int64)
    q_base = q_ptr + batch * q_stride_b + first_token * q_stride_t + tl.cast(head, tl.int64) * q_stride_h
    q = load_tile(q_base, q_stride_t, rows - row, 0, D, BLOCK_M, D1, True)
    q_tail = q
    if D2:
        q_tail = load_tile(q_base, q_stride_t, rows - row, D1, D, BLOCK_M, D2, True)
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
    acc, tail, maximum, total = softmax_start(sinks_ptr, head, BLOCK_M, D1, D2)
    if WINDOWED:
        acc, tail, maximum, total = attend(
            acc, tail, maximum, total, q, q_tail, position, k_base, k_stride_t, v_base, v_stride_t, keys, window,
            first, full_first, CAUSAL, WINDOWED, BEFORE, CAP, FACTOR, PRECISION, D, D1, D2, BLOCK_N, True,
        )  # fmt: skip
    acc, tail, maximum, total = attend(
        acc, tail, maximum, total, q, q_tail, position, k_base, k_stride_t, v_base, v_stride_t, keys, window,
        full_first, full_last, CAUSAL, WINDOWED, BEFORE, CAP, FACTOR, PRECISION, D, D1, D2, BLOCK_N, False,
    )  # fmt: skip
    acc, tail, maximum, total = attend(
        acc, tail, maximum, total, q, q_tail, position, k_base, k_stride_t, v_base, v_stride_t, keys, window,
        full_last, last, CAUSAL, WINDOWED, BEFORE, CAP, FACTOR, PRECISION, D, D1, D2, BLOCK_N, True,
    )  # fmt: skip
    divisor, lse = softmax_end(maximum, total)
    out_base = out_ptr + ((batch * q_len + first_token) * heads + head) * D
    store_tile(out_base, heads * D, rows - row, acc / divisor[:, None], 0, D, BLOCK_M, D1)
    if D2:
        store_tile(out_base, heads * D, rows - row, tail / divisor[:, None], D1, D, BLOCK_M, D2)
    at = tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + (batch * heads + head) * q_len + first_token + at, lse, mask=at < rows - row)
