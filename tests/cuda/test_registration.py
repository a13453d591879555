"""Every op that has CUDA kernels returns what the reference does: shapes, dtypes, strides, and the values."""

from __future__ import annotations

import pytest
import torch

from megalite_kernels import backend
from tests.ops.test_registration import CALLS
from tests.triton.test_registration import results

OPS = [name for name, found in backend._implementations.items() if "cuda" in found]


@pytest.mark.parametrize("name", OPS)
def test_cuda_and_reference_agree(name: str) -> None:
    implementation = backend._implementations[name]["cuda"]
    assert implementation.supports is not None
    if (reason := implementation.supports(*CALLS[name])) is not None:
        pytest.skip(reason)
    ours, theirs = results(name, "cuda"), results(name, "reference")
    described = [[(x.shape, x.dtype, x.stride()) for x in found] for found in (ours, theirs)]
    assert described[0] == described[1]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
