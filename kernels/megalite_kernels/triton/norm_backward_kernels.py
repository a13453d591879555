"""Backward of RMSNorm and LayerNorm: kernels.

With n = (x - mean) * rstd and g = dy * gain: dx = rstd * (g - mean(g) - n * mean(g * n)), the means over a row and
without mean(g) for RMSNorm; dweight = sum(dy * n) and dbias = sum(dy) over the rows. Programs stay for the whole launch
and own contiguous rows, so the column sums are partial per program until the end and need no atomics: their order, and
with it every bit, depends only on the shape and the number of programs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_backward_kernel(
    dy_ptr, dresidual_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr, rows,
    HIDDEN: tl.constexpr, ZERO_CENTERED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients where the column sums of a whole row fit in registers (HIDDEN <= BLOCK_H).

    Grid [programs], at most the multiprocessors times the programs that fit on one; a program owns turns of BLOCK_T
    rows, reads the weight once, and writes its sums to partial [1 or 2, programs, HIDDEN] once. Bytes per element, e
    being its size: dy and x read, dx written, 3e; with a residual its gradient is read, 4e; and 4 (LayerNorm 8) per
    row, 4 (8) per program and column. The next turns are copied to shared memory meanwhile (STAGES - 2 of them while
    one is computed). fp32 throughout.
    """
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    turns = tl.cdiv(rows, BLOCK_T)
    local_row = tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_H)
    in_row = cols < HIDDEN
    offsets = local_row[:, None] * HIDDEN + cols[None, :]
    gain = tl.load(weight_ptr + cols[None, :], mask=in_row[None, :], other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        gain += 1.0
    dweight = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    dbias = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for turn in tl.range(program * turns // programs, (program + 1) * turns // programs, num_stages=STAGES):
        first = turn * BLOCK_T
        base = first * HIDDEN
        row_mask = local_row < rows - first
        mask = row_mask[:, None] & in_row[None, :]
        dy = tl.load(dy_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + first + local_row, mask=row_mask, other=0.0)[:, None]
        if mean_ptr is not None:
            normed -= tl.load(mean_ptr + first + local_row, mask=row_mask, other=0.0)[:, None]
        normed *= rstd
        g = dy * gain
        dweight += dy * normed
        dx = g - normed * (tl.sum(g * normed, 1) / HIDDEN)[:, None]
        if mean_ptr is not None:
            dbias += dy
            dx -= (tl.sum(g, 1) / HIDDEN)[:, None]
        dx *= rstd
        if dresidual_ptr is not None:
            dx += tl.load(dresidual_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + base + offsets, dx, mask=mask)
    tl.store(partial_ptr + program * HIDDEN + cols, tl.sum(dweight, 0), mask=in_row)
    if mean_ptr is not None:
        tl.store(partial_ptr + (programs + program) * HIDDEN + cols, tl.sum(dbias, 0), mask=in_row)


@triton.jit
def loop_backward_kernel(
    dy_ptr, dresidual_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr, rows,
    HIDDEN: tl.constexpr, ZERO_CENTERED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of longer rows, BLOCK_H columns of BLOCK_T rows per turn.

    Grid as `row_backward_kernel`, one program a multiprocessor. From memory the same bytes; from the second-level
    cache besides, per element: the second read of dy and x, 2e, and the program's own sums read and written,
    8 / BLOCK_T (LayerNorm 16 / BLOCK_T) bytes. fp32 throughout.
    """
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    groups = tl.cdiv(rows, BLOCK_T)
    local_row = tl.arange(0, BLOCK_T)
    lane = tl.arange(0, BLOCK_H)
    own = program * groups // programs
    for group in range(own, (program + 1) * groups // programs):
        first = group * BLOCK_T
        base = first * HIDDEN
        row_mask = local_row < rows - first
        rstd = tl.load(rstd_ptr + first + local_row, mask=row_mask, other=0.0)[:, None]
        mean = tl.zeros((BLOCK_T, 1), tl.float32)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + first + local_row, mask=row_mask, other=0.0)[:, None]
        g_normed = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        g_total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        for start in tl.range(0, HIDDEN, BLOCK_H, num_stages=STAGES):
            in_row = start + lane < HIDDEN
            mask = row_mask[:, None] & in_row[None, :]
            offsets = local_row[:, None] * HIDDEN + (start + lane)[None, :]
            dy = tl.load(dy_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
            gain = tl.load(weight_ptr + start + lane, mask=in_row, other=0.0).to(tl.float32)
            if ZERO_CENTERED:
                gain += 1.0
            g = dy * gain[None, :]
            g_normed += g * ((x - mean) * rstd)
            g_total += g
        along = (tl.sum(g_normed, 1) / HIDDEN)[:, None]
        shift = tl.zeros((BLOCK_T, 1), tl.float32)
        if mean_ptr is not None:
            shift = (tl.sum(g_total, 1) / HIDDEN)[:, None]
        for start in tl.range(0, HIDDEN, BLOCK_H, num_stages=STAGES):
            in_row = start + lane < HIDDEN
            mask = row_mask[:, None] & in_row[None, :]
            offsets = local_row[:, None] * HIDDEN + (start + lane)[None, :]
            dy = tl.load(dy_ptr + base + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
            gain = tl.load(weight_ptr + start + lane, mask=in_row, other=0.0).to(tl.float32)
            if ZERO_CENTERED:
                gain += 1.0
            dy = dy.to(tl.float32)
            normed = (x.to(tl.float32) - mean) * rstd
            dx = (dy * gain[None, :] - shift - normed * along) * rstd
            if dresidual_ptr is not None:
                dx += tl.load(dresidual_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + base + offsets, dx, mask=mask)
            begun = (
                tl.where(group > own, start + lane, HIDDEN) < HIDDEN
            )  # the first group finds nothing there
            dweight_ptr = partial_ptr + program * HIDDEN + start + lane
            dweight = tl.load(dweight_ptr, mask=begun, other=0.0) + tl.sum(dy * normed, 0)
            tl.store(dweight_ptr, dweight, mask=in_row)
            if mean_ptr is not None:
                dbias_ptr = dweight_ptr + programs * HIDDEN
                dbias = tl.load(dbias_ptr, mask=begun, other=0.0) + tl.sum(dy, 0)
                tl.store(dbias_ptr, dbias, mask=in_row)


@triton.jit
def sum_partials_kernel(
    partial_ptr, dweight_ptr, dbias_ptr, programs,
    HIDDEN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Column sums of partial [1 or 2, programs, HIDDEN] fp32: dweight, and dbias if there are two.

    Grid [cdiv(HIDDEN, BLOCK_H), 1 or 2]; a program owns BLOCK_H columns of one of them. Reads 4 * programs bytes per
    column, just written and so mostly in the cache, and writes one element. fp32, in the same order always.
    """
    which = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = cols < HIDDEN
    total = tl.zeros((BLOCK_P, BLOCK_H), tl.float32)
    for start in range(0, programs, BLOCK_P):
        program = start + tl.arange(0, BLOCK_P)
        mask = (program < programs)[:, None] & in_row[None, :]
        offsets = (which * programs + program).to(tl.int64)[:, None] * HIDDEN + cols[None, :]
        total += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    column_sum = tl.sum(total, 0)
    if which == 0:
        tl.store(dweight_ptr + cols, column_sum, mask=in_row)
    elif dbias_ptr is not None:
        tl.store(dbias_ptr + cols, column_sum, mask=in_row)
