"""Errors planted in the attention kernels for mma.sync: each function below compiles one direction only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import megalite_kernels as mk
from megalite_kernels.native.cuda import emulated
from megalite_kernels.native.cuda.kernels import attention as kernels
from megalite_kernels.ops.attention import attention_backward, attention_forward
from tests.helpers import attention as helpers
from tests.ops.catalogue import random


def _wrong(direction: str, rows: int, keys: int, dim: int = 64, **options: Any) -> Callable[[], None]:
    """A function that raises if out and lse, or the gradients, are far from the truth, or banks are in conflict."""

    def run() -> None:
        tensors = [random(1, rows, 2, dim), *(random(1, keys, 1, dim, seed=i) for i in (1, 2))]
        inputs = [x.bfloat16() for x in tensors]
        grads = [random(1, rows, 2, dim, seed=4).bfloat16(), random(1, 2, rows, seed=5)]
        truth = helpers.theirs([x.double() for x in inputs], [x.double() for x in grads], None, options)
        with pytest.MonkeyPatch.context() as patch:
            for table in (kernels.FORWARD, kernels.DK_DV, kernels.DQ):
                patch.setitem(table, 64, kernels.Tiles(32, 16, 2))
            with mk.use_backend("cuda"), emulated.reporting() as reports:
                if direction == "forward":
                    got, expected = attention_forward(*inputs, **options), truth[:2]
                else:
                    out, lse = truth[0].bfloat16(), truth[1].float()
                    got = attention_backward(grads[0], *inputs, out, lse, dlse=grads[1], **options)[:3]
                    expected = truth[2:]
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one.double(), other, atol=0.05, rtol=0.05)
        assert not sum(report.bank_conflicts for report in reports)

    return run


_CAUSAL, _FULL, _UNSEEN = (
    _wrong("forward", 37, 53, **options) for options in ({}, {"causal": False}, {"offset": -100})
)
_GRADS = _wrong("backward", 37, 53)
_COMMON, _FORWARD, _BACKWARD = (f"attention_{name}.cuh" for name in ("common", "forward", "backward"))
_LOOP = (
    "for (int pass = 0; pass < passes; pass++) {\n    ptx::cp_async_wait<STAGES - 2>();\n    __syncthreads();"
)
_LAST = (
    "ceil_div(max(min(own.keys, last_position + reach + 1), 0), BLOCK_N);\n\n  const int key_head = own.head"
)

MUTATIONS = [
    # What was summed before a new maximum is not rescaled to it.
    (_FORWARD, "output[m][c][2 * half] *= correction;", "", _CAUSAL),
    # A dropped barrier, and dropped waits for the copies.
    (_FORWARD, "__syncthreads();\n    load(block + STAGES - 1);", "load(block + STAGES - 1);", _CAUSAL),
    (_FORWARD, "ptx::cp_async_wait<STAGES - 2>();", "", _CAUSAL),
    (_FORWARD, "ptx::cp_async_wait<0>();\n  __syncthreads();  // where", "// where", _UNSEEN),
    (_COMMON, "  __syncwarp();\n", "", _CAUSAL),
    (_BACKWARD, _LOOP, _LOOP.replace("__syncthreads();", ""), _GRADS),
    # Wrong masks: a key too few, and a tile that is seen in part taken for one that is seen whole.
    (_COMMON, "column < from || column > to", "column < from || column >= to", _CAUSAL),
    (_FORWARD, "end > min(position + reach, own.keys - 1)", "end > own.keys - 1", _CAUSAL),
    (_BACKWARD, "position + reach < last_key ||", "", _GRADS),
    # A skipped tail of the keys, one that is not hidden, and rows past the end that are read.
    (_FORWARD, _LAST, _LAST.replace("ceil_div(", "(").replace("0), BLOCK_N)", "0) / BLOCK_N)"), _CAUSAL),
    (_FORWARD, "own.keys - 1 - start);", "BLOCK_N);", _FULL),
    (_COMMON, "row < left && chunk * 8 < dim);", "chunk * 8 < dim);", _CAUSAL),
    # Swapped and forgotten indices.
    (_BACKWARD, "delta[n][i % 2]", "delta[n][i / 2]", _GRADS),
    (_BACKWARD, "member * q_stride_h, q_stride_t,", "0 * q_stride_h, q_stride_t,", _GRADS),
    # No swizzle: right, and every load of a matrix eight times as slow.
    (_COMMON, "return row & 7;", "return 0;", _CAUSAL),
]
