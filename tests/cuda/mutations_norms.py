"""Bugs planted into the kernels of the norms and of the rotary embedding; emulation must catch each."""

from __future__ import annotations

_NORMS, _ROPE = "tests/cuda/test_norms.py::", "tests/cuda/test_rope.py::"

MUTATIONS = [
    # Warps read the others' sums before they are written.
    (
        "rows.cuh",
        "slots[n * WARPS + warp_index()] = values[n];\n    }\n    __syncthreads();\n",
        "slots[n * WARPS + warp_index()] = values[n];\n    }\n",
        f"{_NORMS}TestAccuracy::test_rms_norm[block-200-dtype2]",
    ),
    # One set of slots for all turns: a fast warp writes the next row's sum over one that is still read.
    (
        "rms_norm.cuh",
        "row_sums<LANES>(mean, slots + turn * (THREADS / 32));",
        "row_sums<LANES>(mean, slots);",
        f"{_NORMS}TestAccuracy::test_rms_norm[block-200-dtype2]",
    ),
    # The same for the variance, which comes right after the mean.
    (
        "layer_norm.cuh",
        "  row_sums<LANES>(square, slots + THREADS / 32);  // the first sum may still be read\n",
        "  row_sums<LANES>(square, slots);\n",
        f"{_NORMS}TestAccuracy::test_layer_norm[block-200-dtype2]",
    ),
    # Lanes of a row that is not there leave, and the shuffles of the others lack them.
    (
        "rms_norm.cuh",
        "  Part part;\n  part.load(static_cast<const ELEMENT*>(x) + start, columns);\n",
        "  if (columns == 0) return;\n  Part part;\n  part.load(static_cast<const ELEMENT*>(x) + start, columns);\n",
        f"{_NORMS}TestAccuracy::test_rms_norm[warp-64-dtype0]",
    ),
    # The last row's columns are not bounded.
    (
        "rows.cuh",
        "      if (column(step) < columns) runs[step].store(row + column(step));\n",
        "      if (columns > 0) runs[step].store(row + column(step));\n",
        f"{_NORMS}test_nothing_outside_of_the_tensors_is_read_or_written[block-333-dtype2]",
    ),
    # The variance counts the columns that only pad the row.
    (
        "layer_norm.cuh",
        "    const float distance = Part::inside(i, columns) ? part.get(i) - center : 0.0f;\n",
        "    const float distance = part.get(i) - center;\n",
        f"{_NORMS}TestAccuracy::test_layer_norm[block-333-dtype3]",
    ),
    # A turn's mean is merged without its distance from the others'.
    (
        "layer_norm.cuh",
        "    square += apart * apart * count * share;\n",
        "",
        f"{_NORMS}test_a_large_mean_costs_no_digits[long-1031]",
    ),
    # What is written is the residual, not the sum with it.
    (
        "rms_norm.cuh",
        "    part.store(static_cast<ELEMENT*>(total) + start, columns);\n",
        "    other.store(static_cast<ELEMENT*>(total) + start, columns);\n",
        f"{_NORMS}TestAccuracy::test_rms_norm_with_residual[block-333-dtype3]",
    ),
    # Row groups are added up before all have written.
    (
        "rows.cuh",
        "memory[item * Threads + threadIdx.x] = sums[item];\n    __syncthreads();\n",
        "memory[item * Threads + threadIdx.x] = sums[item];\n",
        f"{_NORMS}TestAccuracy::test_rms_norm[warp-64-dtype0]",
    ),
    # The second gradient's sums overwrite what is still read of the first's.
    (
        "rows.cuh",
        "    __syncthreads();  // `memory` may have been read for something else\n",
        "",
        f"{_NORMS}TestAccuracy::test_layer_norm[warp-64-dtype0]",
    ),
    # A stripe's columns are those of the first.
    (
        "layer_norm.cuh",
        "static_cast<const ELEMENT*>(dy) + first_column;",
        "static_cast<const ELEMENT*>(dy);",
        f"{_NORMS}TestAccuracy::test_layer_norm[long-1031-dtype5]",
    ),
    # The last partial sums are left out.
    (
        "sum_partials.cuh",
        "for (int other = 1; other < WARPS; ++other)",
        "for (int other = 1; other < WARPS - 7; ++other)",
        f"{_NORMS}TestAccuracy::test_rms_norm[block-200-dtype2]",
    ),
    # The rotation goes the same way in the backward.
    (
        "rope.cuh",
        "back.load(cos, sin, index % table_rows, token.dim, token.half, -1.0f);",
        "back.load(cos, sin, index % table_rows, token.dim, token.half, 1.0f);",
        f"{_ROPE}test_norm_accuracy[64-32-False-dtype3]",
    ),
    # In place, the second feature of a pair is turned by the first's new value.
    (
        "rope.cuh",
        "        b = b * cos[pair] + a * sin[pair];\n        a = turned;\n",
        "        a = turned;\n        b = b * cos[pair] + a * sin[pair];\n",
        f"{_ROPE}test_accuracy[64-32-False-dtype3]",
    ),
    # Features that pass through start in the middle of those that turn.
    (
        "rope.cuh",
        "first = 2 * half + 2 * (unit - turning) * RUN;",
        "first = half + 2 * (unit - turning) * RUN;",
        f"{_ROPE}test_accuracy[48-16-False-dtype2]",
    ),
    # Keys are turned with the queries' strides.
    (
        "rope.cuh",
        "rope_heads(token, angles, k, k_out, View{k_by_batch,",
        "rope_heads(token, angles, k, k_out, View{q_by_batch,",
        f"{_ROPE}test_accuracy[26-13-True-dtype0]",
    ),
    # A batch's own angles are taken for everybody's.
    (
        "rope.cuh",
        "angles.load(cos, sin, token.index % table_rows, token.dim, token.half, direction);",
        "angles.load(cos, sin, token.place, token.dim, token.half, direction);",
        f"{_ROPE}test_views_and_tables",
    ),
    # The slots' sums of a weight's gradient are read without waiting for them.
    (
        "rope.cuh",
        "memory[item * THREADS + threadIdx.x] = sums[item];\n  __syncthreads();\n",
        "memory[item * THREADS + threadIdx.x] = sums[item];\n",
        f"{_ROPE}test_as_launched_on_a_gpu",
    ),
]
