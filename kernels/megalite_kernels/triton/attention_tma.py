"""Attention forward whose tiles come through the tensor memory accelerator (Hopper, Blackwell).

The loop of `attention_forward` with descriptors in place of pointers: one thread asks for a tile, no thread spends
registers on addresses. Documents and batch entries are ranges of the rows of one descriptor [tokens, heads, D], so a
tile at the end of a range may bring rows of the next: their scores are masked, and their values, which a probability of
0 would not keep out if they are not finite, are cleared.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megalite_kernels.triton.attention_common import (
    capped,
    document,
    key_range,
    masked,
    owned_tile,
    store_tile,
)
from megalite_kernels.triton.attention_forward import softmax_end, softmax_start, softmax_step


@triton.jit
def fetch(descriptor, row, head, ROWS: tl.constexpr, COLUMN: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of one head."""
    return tl.reshape(descriptor.load([row, head, COLUMN]), (ROWS, COLUMNS))


@triton.jit
def attend(
    acc, tail, maximum, total, q, q_tail, position, k_desc, k_tail_desc, v_desc, v_tail_desc, k_start, k_len,
    kv_head, window, first, last,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BEFORE: tl.constexpr, CAP: tl.constexpr, FACTOR: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CLEAR: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """The state after the key blocks from first to last; with MASKED any of them may be seen in part."""
    for start in tl.range(first, last, BLOCK_N, warp_specialize=SPECIALIZED):
        k = fetch(k_desc, k_start + start, kv_head, BLOCK_N, 0, D1)
        scores = tl.dot(q, tl.trans(k))
        if D2:
            k_tail = fetch(k_tail_desc, k_start + start, kv_head, BLOCK_N, D1, D2)
            scores = tl.dot(q_tail, tl.trans(k_tail), scores)
        scores, _ = capped(scores, BEFORE, CAP, False)
        key = start + tl.arange(0, BLOCK_N)
        if MASKED:
            scores = masked(scores, position[:, None], key[None, :], k_len, window, CAUSAL, WINDOWED)
        probabilities, correction, maximum, total = softmax_step(scores, maximum, total, FACTOR, MASKED)
        narrow = probabilities.to(q.dtype)
        v = fetch(v_desc, k_start + start, kv_head, BLOCK_N, 0, D1)
        if CLEAR:
            v = tl.where(key[:, None] < k_len, v, 0.0)
        acc = tl.dot(narrow, v, acc * correction[:, None])
        if D2:
            v_tail = fetch(v_tail_desc, k_start + start, kv_head, BLOCK_N, D1, D2)
            if CLEAR:
                v_tail = tl.where(key[:, None] < k_len, v_tail, 0.0)
            tail = tl.dot(narrow, v_tail, tail * correction[:, None])
    return acc, tail, maximum, total


@triton.jit(do_not_specialize=["q_len", "k_len", "window", "offset", "blocks", "sequences", "section"])
def attention_forward_tma_kernel(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, v_tail_desc, out_ptr, lse_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr,
    q_len, k_len, window, offset, heads, groups, blocks, sequences, section,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
    BEFORE: tl.constexpr, CAP: tl.constexpr, FACTOR: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CLEAR: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """Grid, ownership, bytes, FLOPs and dtypes as `attention_forward_kernel`; D is D1 + D2."""
    block, head, sequence = owned_tile(blocks, heads, sequences, section, CAUSAL)
    batch, q_start, rows, k_start, keys = document(cu_q_ptr, cu_k_ptr, sequence, q_len, k_len, PACKED)
    row = block * BLOCK_M
    shift = keys - rows + offset
    if row >= rows:  # past the end of a document; the compiler's specialisation of warps bars a return here
        keys = 0
    position = row + tl.arange(0, BLOCK_M) + shift
    kv_head = head // groups
    q_start += batch * q_len + row
    k_start += batch * k_len
    q = fetch(q_desc, q_start, head, BLOCK_M, 0, D1)
    q_tail = q
    if D2:
        q_tail = fetch(q_tail_desc, q_start, head, BLOCK_M, D1, D2)
    first, full_first, full_last, last = key_range(
        row, tl.minimum(BLOCK_M, rows - row), shift, keys, window, CAUSAL, WINDOWED, BLOCK_N
    )
    acc, tail, maximum, total = softmax_start(sinks_ptr, head, BLOCK_M, D1, D2)
    if WINDOWED:
        acc, tail, maximum, total = attend(
            acc, tail, maximum, total, q, q_tail, position, k_desc, k_tail_desc, v_desc, v_tail_desc, k_start, keys,
            kv_head, window, first, full_first,
            CAUSAL, WINDOWED, BEFORE, CAP, FACTOR, D1, D2, BLOCK_N, True, CLEAR, SPECIALIZED,
        )  # fmt: skip
    acc, tail, maximum, total = attend(
        acc, tail, maximum, total, q, q_tail, position, k_desc, k_tail_desc, v_desc, v_tail_desc, k_start, keys,
        kv_head, window, full_first, full_last,
        CAUSAL, WINDOWED, BEFORE, CAP, FACTOR, D1, D2, BLOCK_N, False, False, SPECIALIZED,
    )  # fmt: skip
    acc, tail, maximum, total = attend(
        acc, tail, maximum, total, q, q_tail, position, k_desc, k_tail_desc, v_desc, v_tail_desc, k_start, keys,
        kv_head, window, full_last, last,
        CAUSAL, WINDOWED, BEFORE, CAP, FACTOR, D1, D2, BLOCK_N, True, CLEAR, SPECIALIZED,
    )  # fmt: skip
    divisor, lse = softmax_end(maximum, total)
    token = tl.cast(q_start, tl.int64)
    out_base = out_ptr + (token * heads + head) * D
    store_tile(out_base, heads * D, rows - row, acc / divisor[:, None], 0, D, BLOCK_M, D1)
    if D2:
        store_tile(out_base, heads * D, rows - row, tail / divisor[:, None], D1, D, BLOCK_M, D2)
    at = tl.arange(0, BLOCK_M)
    first_lse = (
        lse_ptr + tl.cast(batch, tl.int64) * (heads - 1) * q_len + tl.cast(head, tl.int64) * q_len + token
    )
    tl.store(first_lse + at, lse, mask=at < rows - row)
