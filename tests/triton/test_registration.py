"""Every op that has Triton kernels returns what the reference does: shapes, dtypes, strides, and the values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalite_kernels import backend
from tests.ops.test_registration import CALLS

OPS = [name for name, found in backend._implementations.items() if "triton" in found]


def results(name: str, chosen: str) -> list[Tensor]:
    """What the op returns, then its arguments, as an op that ends in `_` writes those."""
    function = backend._implementations[name][chosen].load()
    assert function is not None
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in CALLS[name]]
    result: Any = function(*arguments)
    returned = result if isinstance(result, tuple) else (result,)
    return [x for x in (*returned, *arguments) if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", OPS)
def test_triton_and_reference_agree(name: str) -> None:
    ours, theirs = results(name, "triton"), results(name, "reference")
    described = [[(x.shape, x.dtype, x.stride()) for x in found] for found in (ours, theirs)]
    assert described[0] == described[1]
    for a, b in zip(ours, theirs, strict=True):
        a, b = (x.float() if x.itemsize == 1 and x.is_floating_point() else x for x in (a, b))  # FP8
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
