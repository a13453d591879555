"""What the attention kernels share: which tile a program owns, what its rows may see, tiles in memory, soft-cap.

Query i of a document stands at key position p = i + shift, shift = k_len - q_len + offset. It sees the keys j with
j <= p (causal), p - window < j < p + window (window), 0 <= j < k_len. A head of D features is held as two tiles
of D1 and D2 columns, D1 a power of two: 96 = 64 + 32 and 80 = 64 + 16, where padding to 128 would waste a quarter
of the products and more. Logits are in base 2 throughout: one exp2 per score and no multiplication of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def owned_tile(blocks, heads, sequences, section, LAST_FIRST: tl.constexpr):
    """(block, head, sequence) of this program.

    Pairs of head and sequence go in sections whose other operands fit the L2 cache together; inside a section the
    blocks with the most work come first in every pair, so that the last wave of programs is made of short ones.
    """
    program = tl.program_id(0)
    pairs = heads * sequences
    first = program // (blocks * section) * section
    width = tl.minimum(section, pairs - first)
    place = program - first * blocks
    block = place // width
    pair = first + place % width
    if LAST_FIRST:
        block = blocks - 1 - block
    return block, pair % heads, pair // heads


@triton.jit
def document(cu_q_ptr, cu_k_ptr, sequence, q_len, k_len, PACKED: tl.constexpr):
    """(batch, first query token, queries, first key token, keys) of a sequence; dense ones are a batch entry each."""
    batch = sequence
    q_start = 0
    k_start = 0
    if PACKED:
        batch = 0
        q_start = tl.load(cu_q_ptr + sequence)
        q_len = tl.load(cu_q_ptr + sequence + 1) - q_start
        k_start = tl.load(cu_k_ptr + sequence)
        k_len = tl.load(cu_k_ptr + sequence + 1) - k_start
    return batch, q_start, q_len, k_start, k_len


@triton.jit
def key_range(
    row, rows, shift, k_len, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Key blocks that the queries [row, row + rows) see: (first, full_first, full_last, last).

    Between full_first and full_last every query sees every key, so those blocks need no mask.
    """
    first, full_first, last, full_last = 0, 0, k_len, k_len
    if CAUSAL:
        last = tl.minimum(last, row + rows + shift)
        full_last = tl.minimum(full_last, row + shift + 1)
    elif WINDOWED:
        last = tl.minimum(last, row + rows - 1 + shift + window)
        full_last = tl.minimum(full_last, row + shift + window)
    last = tl.maximum(last, 0)
    full_last = tl.maximum(full_last, 0) // BLOCK_N * BLOCK_N
    if WINDOWED:
        first = tl.maximum(row + shift - window + 1, 0) // BLOCK_N * BLOCK_N
        full_first = tl.cdiv(tl.maximum(row + rows + shift - window, 0), BLOCK_N) * BLOCK_N
        full_first = tl.minimum(
            tl.maximum(full_first, first), tl.maximum(tl.cdiv(last, BLOCK_N) * BLOCK_N, first)
        )
    full_last = tl.maximum(full_last, full_first)
    return first, full_first, full_last, last


@triton.jit
def query_range(
    key, keys, shift, q_len, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """As `key_range`: query blocks that see one of the keys [key, key + keys)."""
    first, full_first, last, full_last = 0, 0, q_len, q_len
    if CAUSAL:
        first = key - shift
        full_first = key + keys - 1 - shift
    elif WINDOWED:
        first = key - shift - window + 1
        full_first = key + keys - shift - window
    if WINDOWED:
        last = tl.minimum(last, key + keys - 1 - shift + window)
        full_last = tl.minimum(full_last, key - shift + window)
    first = tl.maximum(first, 0) // BLOCK_M * BLOCK_M
    last = tl.maximum(last, 0)
    full_last = tl.maximum(full_last, 0) // BLOCK_M * BLOCK_M
    full_first = tl.cdiv(tl.maximum(full_first, 0), BLOCK_M) * BLOCK_M
    full_first = tl.minimum(
        tl.maximum(full_first, first), tl.maximum(tl.cdiv(last, BLOCK_M) * BLOCK_M, first)
    )
    full_last = tl.maximum(full_last, full_first)
    return first, full_first, full_last, last


@triton.jit
def masked(scores, position, key, limit, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Scores with -inf where the query at `position` does not see `key`, or `key` is not below `limit`."""
    seen = key < limit
    if CAUSAL:
        seen = seen & (key <= position)
    elif WINDOWED:
        seen = seen & (key < position + window)
    if WINDOWED:
        seen = seen & (key > position - window)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def load_tile(
    base, stride, rows, COLUMN: tl.constexpr, D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_D] from column COLUMN on; zeros past the D columns and, if RAGGED, past the rows."""
    row = tl.arange(0, BLOCK_R)[:, None]
    column = COLUMN + tl.arange(0, BLOCK_D)[None, :]
    at = base + (row * stride + column)
    if RAGGED and COLUMN + BLOCK_D > D:
        return tl.load(at, mask=(row < rows) & (column < D), other=0.0)
    elif RAGGED:
        return tl.load(at, mask=row < rows, other=0.0)
    elif COLUMN + BLOCK_D > D:
        return tl.load(at, mask=column < D, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_tile(
    base, stride, rows, value, COLUMN: tl.constexpr, D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The counterpart of `load_tile`, rounding to what the memory holds."""
    row = tl.arange(0, BLOCK_R)[:, None]
    column = COLUMN + tl.arange(0, BLOCK_D)[None, :]
    at = base + (row * stride + column)
    if COLUMN + BLOCK_D > D:
        tl.store(at, value.to(base.dtype.element_ty), mask=(row < rows) & (column < D))
    else:
        tl.store(at, value.to(base.dtype.element_ty), mask=row < rows)


@triton.jit
def capped(scores, BEFORE: tl.constexpr, CAP: tl.constexpr, ACCURATE: tl.constexpr):
    """(base-2 logits but for the last factor, tanh): `CAP * tanh(BEFORE * scores)`, without CAP `BEFORE * scores`."""
    bent = scores
    if BEFORE != 1.0:
        scores = scores * BEFORE
    if CAP > 0.0:
        bent = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores))
        if ACCURATE:  # 1 - 2 / (1 + e) loses digits near 0: the series there is within 1e-7, relative
            square = scores * scores
            series = -0.05396825397 + square * (0.02186948854 - square * 0.00886323553)
            series = 1.0 + square * (-0.33333333333 + square * (0.13333333333 + square * series))
            bent = tl.where(square < 0.1, scores * series, bent)
        scores = CAP * bent
    return scores, bent
