"""Gradient of an embedding without atomics: tokens sorted by id, each row the sum of its tokens in their order.

Equal ids are neighbours once sorted, and how many different ones there are stays on the device: a program for every
token, of which only those that head a piece work. Pieces end where the id changes and at every multiple of PIECE
positions, so that a token which fills half of the batch keeps many programs busy; a second kernel adds its pieces.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.triton.launch import Launch, Table, launch

# 1,024 columns are a 16-byte load of bf16 for each of 128 threads. With 128 positions a piece, 16,384 tokens of one id
# are 128 pieces of 128: both kernels take the same time at most.
PIECES = Table(
    "embedding_bwd", {"default": Launch({"PIECE": 128, "BLOCK_H": 1024}, num_warps=4, num_stages=1)}
)


@triton.jit
def write_row(out_ptr, stride_v, row, rows, hidden, cols, total, ACCUMULATE: tl.constexpr):
    """Row `row` of out, [rows, hidden]: total, or total added to it; ids out of range are left out."""
    if (row >= 0) & (row < rows):
        at = out_ptr + row * stride_v + cols
        if ACCUMULATE:
            total += tl.load(at, mask=cols < hidden, other=0.0)
        tl.store(at, total.to(out_ptr.dtype.element_ty), mask=cols < hidden)


@triton.jit
def pieces_kernel(
    dy_ptr, ids_ptr, order_ptr, out_ptr, partial_ptr, tokens, rows, hidden, stride_t, stride_v,
    ACCUMULATE: tl.constexpr, PIECE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid [tokens, hidden / BLOCK_H]; a program owns BLOCK_H columns of the piece that begins at its position.

    Reads every row of dy once and 16 bytes of id and order a token; writes a row of out for each id whose tokens are
    one piece (reads it too where it accumulates), and a row of partial, fp32, for other pieces. Sums in fp32.
    """
    first = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + first)
    is_head = (first == 0) | (tl.load(ids_ptr + tl.maximum(first - 1, 0)) != row)
    if is_head | (first % PIECE == 0):
        cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        end = tl.minimum((first // PIECE + 1) * PIECE, tokens)
        at = first + tl.arange(0, PIECE)
        same = (at < end) & (tl.load(ids_ptr + at, mask=at < end, other=0) == row)
        length = tl.sum(same.to(tl.int32), 0)
        total = tl.zeros((BLOCK_H,), tl.float32)
        for i in tl.range(0, length, loop_unroll_factor=4):
            token = tl.load(order_ptr + first + i)
            total += tl.load(dy_ptr + token * stride_t + cols, mask=cols < hidden, other=0.0).to(tl.float32)
        following = tl.minimum(first + length, tokens - 1)
        goes_on = (first + length < tokens) & (tl.load(ids_ptr + following) == row)
        if is_head & (goes_on == 0):
            write_row(out_ptr, stride_v, row, rows, hidden, cols, total, ACCUMULATE)
        else:  # at most two a bin of PIECE positions: one that goes on from the bin before, one into the next
            slot = first // PIECE * 2 + is_head.to(tl.int64)
            tl.store(partial_ptr + slot * hidden + cols, total, mask=cols < hidden)


@triton.jit
def join_kernel(
    ids_ptr, out_ptr, partial_ptr, tokens, rows, hidden, stride_v,
    ACCUMULATE: tl.constexpr, PIECE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid [bins - 1, hidden / BLOCK_H]; a program owns the id that begins in its bin and goes on into the next.

    Reads the pieces' rows of partial, writes the row of out; sums in fp32, in the order of the pieces.
    """
    bin_number = tl.program_id(0).to(tl.int64)
    begin, end = bin_number * PIECE, (bin_number + 1) * PIECE
    row = tl.load(ids_ptr + end - 1)
    begins_here = (bin_number == 0) | (tl.load(ids_ptr + begin) != row)
    begins_here = begins_here | (tl.load(ids_ptr + tl.maximum(begin - 1, 0)) != row)
    if begins_here & (tl.load(ids_ptr + end) == row):
        cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        total = tl.load(partial_ptr + (bin_number * 2 + 1) * hidden + cols, mask=cols < hidden, other=0.0)
        while (end < tokens) & (tl.load(ids_ptr + tl.minimum(end, tokens - 1)) == row):
            slot = end // PIECE * 2
            total += tl.load(partial_ptr + slot * hidden + cols, mask=cols < hidden, other=0.0)
            end += PIECE
        write_row(out_ptr, stride_v, row, rows, hidden, cols, total, ACCUMULATE)


def _add_rows(dy: Tensor, ids: Tensor, out: Tensor, *, accumulate: bool) -> None:
    tokens, hidden = dy.shape
    if dy.stride(1) != 1 and hidden > 1:
        dy = dy.contiguous()
    config = PIECES.pick()
    bins, columns = (
        triton.cdiv(tokens, config.blocks["PIECE"]),
        triton.cdiv(hidden, config.blocks["BLOCK_H"]),
    )
    sorted_ids, order = torch.sort(ids, stable=True)
    partial = dy.new_empty((2 * bins, hidden), dtype=torch.float32)
    rows = out.shape[0]
    launch(
        pieces_kernel,
        (tokens, columns),
        config,
        dy, sorted_ids, order, out, partial, tokens, rows, hidden, dy.stride(0), out.stride(0),
        ACCUMULATE=accumulate,
    )  # fmt: skip
    launch(
        join_kernel,
        (max(0, bins - 1), columns),
        config,
        sorted_ids, out, partial, tokens, rows, hidden, out.stride(0),
        ACCUMULATE=accumulate,
    )  # fmt: skip


def backward(dy: Tensor, ids: Tensor, num_embeddings: int) -> Tensor:
    """Backend "triton" of `embedding_bwd`; rows without a token are zero."""
    dweight = dy.new_zeros((num_embeddings, dy.shape[1]))
    _add_rows(dy, ids, dweight, accumulate=False)
    return dweight


def backward_(dy: Tensor, ids: Tensor, main_grad: Tensor) -> None:
    """Backend "triton" of `embedding_bwd_`; rows without a token are not touched."""
    if main_grad.stride(1) == 1 or main_grad.shape[1] == 1:
        _add_rows(dy, ids, main_grad, accumulate=True)
    else:
        main_grad += backward(dy.float(), ids, main_grad.shape[0])
