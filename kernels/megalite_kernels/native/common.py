"""What the callers of the native library share: dtype codes, addresses, thread counts."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`DType` of csrc/api.h."""

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "relu2": 2, "gelu": 3}
"""`Activation` of csrc/api.h."""


def address(tensor: Tensor | None) -> int:
    """Where a tensor's data starts; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def float_weights(weight: Tensor) -> Tensor:
    """A small parameter (a norm's gain) as the contiguous float32 that kernels read."""
    if weight.dtype == torch.float32 and weight.is_contiguous():
        return weight  # before torch is asked for two tensors that it need not make
    return weight.to(torch.float32).contiguous()


def threads() -> int:
    """Parts to cut the work into: torch's own number of threads, whose OpenMP pool the library shares."""
    return torch.get_num_threads()


def by_token(x: Tensor) -> Tensor:
    """[B, S, heads, D] or [T, heads, D] with features side by side and one stride from each token to the next.

    A view into a fused projection is like that already; anything else is copied.
    """
    if x.stride(-1) != 1:
        return x.contiguous()
    if x.dim() == 3 or x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1):
        return x
    if x.shape[1] == 1:  # contiguous or not, the stride of its only token says nothing
        return x.as_strided(x.shape, (x.stride(0), x.stride(0), *x.stride()[2:]))
    return x.contiguous()
