"""Rotary embedding on the CUDA kernels of csrc/cuda/rope.cuh: the raw ops. q and k may be views of one projection."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels.native.cuda.kernels.rope import BLOCKS_OF_BACKWARD, rope_kernel
from megalite_kernels.native.cuda.rows import ELEMENTS, readable, sum_partials
from megalite_kernels.native.cuda.runtime import launch, multiprocessors


def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Backend "cuda" of `rope_fwd`."""
    outputs = q.new_empty(q.shape), k.new_empty(k.shape)
    _rotate(_side_by_side(q), _side_by_side(k), outputs, cos, sin, interleaved, inverse, in_place=False)
    return outputs


def forward_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> None:
    """Backend "cuda" of `rope_`; features that are not neighbours take a copy and back."""
    if _side_by_side(q) is q and _side_by_side(k) is k:
        _rotate(q, k, (q, k), cos, sin, interleaved, inverse, in_place=True)
        return
    for x, turned in zip((q, k), forward(q, k, cos, sin, interleaved, inverse), strict=True):
        x.copy_(turned)


def _rotate(
    q: Tensor, k: Tensor, outputs: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor,
    interleaved: bool, inverse: bool, *, in_place: bool,
) -> None:  # fmt: skip
    cos, sin = _table(cos), _table(sin)
    element, half = ELEMENTS[q.dtype], cos.shape[-1]
    kernel = rope_kernel(
        "rope_forward",
        element,
        element,
        dim=q.shape[-1],
        half=half,
        interleaved=interleaved,
        aligned=_aligned(half, q, k, *outputs, cos, sin),
    )
    direction = -1.0 if inverse else 1.0
    args = (
        q,
        k,
        *outputs,
        cos,
        sin,
        *_shape(q, k, cos),
        *_strides(q),
        *_strides(k),
        int(in_place),
        direction,
    )
    launch(kernel, (q.shape[:-2].numel(), 1, 1), args, q.device)


def norm_forward(
    q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, eps: float, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Backend "cuda" of `rope_norm_fwd`."""
    outputs = q.new_empty(q.shape), k.new_empty(k.shape)
    q, k, cos, sin = _side_by_side(q), _side_by_side(k), _table(cos), _table(sin)
    q_rstd, k_rstd = (x.new_empty(x.shape[:-1].numel(), dtype=torch.float32) for x in (q, k))
    weights = _weights(q_norm, k_norm, q)
    half = cos.shape[-1]
    kernel = rope_kernel(
        "rope_norm_forward",
        ELEMENTS[q.dtype],
        ELEMENTS[weights[0].dtype],
        dim=q.shape[-1],
        half=half,
        interleaved=interleaved,
        aligned=_aligned(half, q, k, *outputs, *weights, cos, sin),
    )
    args = (
        q, k, *outputs, *weights, q_rstd, k_rstd, cos, sin, *_shape(q, k, cos), *_strides(q), *_strides(k), eps
    )  # fmt: skip
    launch(kernel, (q.shape[:-2].numel(), 1, 1), args, q.device)
    return *outputs, q_rstd, k_rstd


def norm_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor,
    q_rstd: Tensor, k_rstd: Tensor, cos: Tensor, sin: Tensor, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Backend "cuda" of `rope_norm_bwd`."""
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    tokens, dim, half = q.shape[:-2].numel(), q.shape[-1], cos.shape[-1]
    if tokens == 0 or dim == 0:
        return dq, dk, torch.zeros_like(q_norm), torch.zeros_like(k_norm)
    inputs = [_side_by_side(x) for x in (dq_out, dk_out, q, k)]
    cos, sin, weights = _table(cos), _table(sin), _weights(q_norm, k_norm, q)
    kernel = rope_kernel(
        "rope_norm_backward",
        ELEMENTS[q.dtype],
        ELEMENTS[weights[0].dtype],
        dim=dim,
        half=half,
        interleaved=interleaved,
        aligned=_aligned(half, *inputs, dq, dk, *weights, cos, sin),
    )
    blocks = min(tokens, BLOCKS_OF_BACKWARD * multiprocessors(q.device))
    partial = q_rstd.new_empty((2, blocks, dim))
    strides = [step for x in inputs for step in _strides(x)]
    args = (
        *inputs, dq, dk, *weights, q_rstd, k_rstd, cos, sin, partial, tokens, *_shape(q, k, cos), *strides
    )  # fmt: skip
    launch(kernel, (blocks, 1, 1), args, q.device)
    dq_norm, dk_norm = sum_partials(partial, weights[0].dtype)
    return dq, dk, dq_norm.to(q_norm.dtype), dk_norm.to(k_norm.dtype)


def _side_by_side(x: Tensor) -> Tensor:
    """x with neighbouring features, copied only if they aren't."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _table(angles: Tensor) -> Tensor:
    return angles.to(torch.float32).contiguous()


def _weights(q_norm: Tensor, k_norm: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Both weights in one dtype that a kernel reads: that of the heads if they have it, else float32."""
    same = q_norm.dtype == k_norm.dtype
    weights = [readable(w if same else w.float(), like) for w in (q_norm, k_norm)]
    assert weights[0] is not None
    assert weights[1] is not None
    return weights[0], weights[1]


def _strides(x: Tensor) -> tuple[int, int, int]:
    """By batch, place and head, in elements."""
    return x.stride(0) if x.dim() == 4 else 0, x.stride(-3), x.stride(-2)


def _shape(q: Tensor, k: Tensor, cos: Tensor) -> tuple[int, ...]:
    """Sequence, rows of the tables, heads of both, features, pairs."""
    return (
        max(1, q.shape[-3]),
        max(1, cos.shape[:-1].numel()),
        q.shape[-2],
        k.shape[-2],
        q.shape[-1],
        cos.shape[-1],
    )


def _aligned(half: int, *tensors: Tensor) -> bool:
    """Whether 16 bytes of the heads, and with them whole pairs, can move at a time in all of the tensors.

    The first is like q; the tables and weights are among the others.
    """
    size = tensors[0].element_size()
    if half * size % 16 or tensors[0].shape[-1] * size % 16:
        return False
    for x in tensors:
        strides = x.stride()[:-1] if x.dim() > 2 else ()
        if x.data_ptr() % 16 or any(step * x.element_size() % 16 for step in strides):
            return False
    return True
