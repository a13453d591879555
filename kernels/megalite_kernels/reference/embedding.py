"""Gradient of an embedding in plain torch: rows are summed in the order of the tokens."""

from __future__ import annotations

from torch import Tensor

from megalite_kernels.reference.common import wide_dtype


def backward(dy: Tensor, ids: Tensor, num_embeddings: int) -> Tensor:
    """dweight [num_embeddings, H] like dy: row i is the sum of dy over the tokens with id i, rounded once."""
    sums = dy.new_zeros((num_embeddings, dy.shape[-1]), dtype=wide_dtype(dy))
    backward_(dy, ids, sums)
    return sums.to(dy.dtype)


def backward_(dy: Tensor, ids: Tensor, main_grad: Tensor) -> None:
    """main_grad[ids] += dy, one token after the other."""
    wide = dy.to(main_grad.dtype)
    if dy.device.type == "cpu":
        main_grad.index_add_(0, ids, wide)
    else:  # index_add_ is atomic on GPUs, index_put_ sorts
        main_grad.index_put_((ids,), wide, accumulate=True)
