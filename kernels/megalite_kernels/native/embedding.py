"""Gradient of an embedding on the native library."""

from __future__ import annotations

from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import DTYPES, address, threads


def backward(dy: Tensor, ids: Tensor, num_embeddings: int) -> Tensor:
    """Backend "cpu" of `embedding_bwd`."""
    dy, ids = dy.contiguous(), ids.contiguous()
    dweight = dy.new_empty((num_embeddings, dy.shape[-1]))
    pointers = (address(dy), address(ids), address(dweight))
    bad = _C.embedding_backward(DTYPES[dy.dtype], *pointers, ids.numel(), *dweight.shape, threads())
    _refuse(bad, ids, num_embeddings)
    return dweight


def backward_(dy: Tensor, ids: Tensor, main_grad: Tensor) -> None:
    """Backend "cpu" of `embedding_bwd_`."""
    dy, ids = dy.contiguous(), ids.contiguous()
    pointers = (address(dy), address(ids), address(main_grad))
    bad = _C.embedding_accumulate(DTYPES[dy.dtype], *pointers, ids.numel(), *main_grad.shape, threads())
    _refuse(bad, ids, main_grad.shape[0])


def _refuse(bad: int, ids: Tensor, rows: int) -> None:
    if bad >= 0:
        raise ValueError(f"ids[{bad}]={int(ids[bad])} must be at least 0 and less than the {rows} rows")
