"""Bugs planted into the kernels of losses and optimizer; emulation must catch each.

(file of csrc/cuda, its text, what takes its place, test that must fail)
"""

from __future__ import annotations

_LOSS, _ADAMW, _NORM = (f"tests/cuda/test_{name}.py::" for name in ("cross_entropy", "adamw", "grad_norm"))
_IN_ONE = f"{_LOSS}test_loss_and_gradient_in_one[scalar-options0-"

MUTATIONS = [
    # A thread reads what it has copied one stage too early.
    ("cross_entropy.cuh", "COPY_STAGES - 1 - STAGE>();", "COPY_STAGES - STAGE>();", f"{_IN_ONE}kept]"),
    # The last columns of a row that is no multiple of 16 bytes are left out.
    (
        "cross_entropy.cuh",
        "for (int j = tail + threadIdx.x; j < cols;",
        "for (int j = tail + threadIdx.x; j < tail;",
        f"{_LOSS}test_accuracy[53-options0-dtype0]",
    ),
    # Rows are taken to begin at 16 bytes.
    ("cross_entropy.cuh", "int(-address & 15)", "int(0)", f"{_LOSS}test_accuracy[53-options0-dtype0]"),
    # The columns beside the vectors are counted by every block of a cluster.
    ("cross_entropy.cuh", "int(cols), block == 0);", "int(cols));", f"{_IN_ONE}cluster of 2]"),
    # The target is one column further.
    ("cross_entropy.cuh", "column - first == i)", "column - first == i + 1)", f"{_IN_ONE}kept]"),
    # A token to be ignored has a class of the vocabulary.
    (
        "cross_entropy.cuh",
        "const bool here = !ignored && local >= 0",
        "const bool here = local >= 0",
        f"{_LOSS}test_masked_classes_views_ignored_and_empty",
    ),
    # A sum keeps the scale of an older maximum: in a thread, and between the lanes of a warp.
    (
        "row_sums.cuh",
        "total = fmaf(total, exponential(top - best), part);",
        "total += part;",
        f"{_LOSS}test_accuracy[3100-options7-dtype7]",
    ),
    ("row_sums.cuh", "  mine.raise(best);\n#pragma unroll\n", "#pragma unroll\n", f"{_IN_ONE}kept]"),
    # +inf less +inf.
    (
        "row_sums.cuh",
        "    best = fminf(best, LARGEST);\n",
        "",
        f"{_LOSS}test_non_finite_values_do_what_they_do_in_torch[40-None-inf]",
    ),
    # No barrier between the warps' sums and who reads them.
    ("row_sums.cuh", "  __syncthreads();\n  return", "  return", f"{_IN_ONE}kept]"),
    # Blocks of a cluster read sums that may not be there yet, or of a block that has ended.
    (
        "row_sums.cuh",
        "*exchange = mine;\n  ptx::cluster_sync();\n",
        "*exchange = mine;\n",
        f"{_IN_ONE}cluster of 2]",
    ),
    (
        "row_sums.cuh",
        "ptx::cluster_sync();  // and none",
        "__syncthreads();  // and none",
        f"{_IN_ONE}cluster of 8]",
    ),
    # The last group of a buffer is written whole.
    (
        "adamw.cuh",
        "if (at + k < size) buffer[at + k] = x[k];",
        "buffer[at + k] = x[k];",
        f"{_ADAMW}test_agrees_with_torch[7-dtype0]",
    ),
    # A shard's alignment is not looked at.
    ("adamw.cuh", "wide % 16 == 0 && ", "", f"{_ADAMW}test_buffers_may_begin_anywhere[1-dtype0]"),
    # A skipped step steps.
    (
        "adamw.cuh",
        "if (*scalars.skip) return;",
        "",
        f"{_ADAMW}test_a_skipped_step_changes_no_bit[nan-dtype0]",
    ),
    # Half of the hash is left out.
    (
        "adamw.cuh",
        "^ word) + word) >> 16",
        "^ word)) >> 16",
        f"{_ADAMW}test_stochastic_rounding[311-8589934597-8589934593]",
    ),
    # An element too many of the last chunk.
    ("grad_norm.cuh", "at + i < size ?", "at + i <= size ?", f"{_NORM}test_accuracy[9999-dtype0]"),
    # Squares in float32.
    (
        "grad_norm.cuh",
        "fma(double(x[i]), double(x[i]), sums[i % SUMS])",
        "sums[i % SUMS] + double(x[i] * x[i])",
        f"{_NORM}test_squares_neither_overflow_nor_vanish[1e+25]",
    ),
    # A tensor in the last slot is forgotten.
    ("grad_norm.cuh", ", look(x7, n7);", ";", f"{_NORM}test_nine_flat_buffers_are_two_launches_and_a_total"),
]
