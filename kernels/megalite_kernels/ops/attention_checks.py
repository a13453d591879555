"""What `attention` and its parts take: checks, and the options as the raw ops want them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalite_kernels.ops import checks


def raw_options(
    head_dim: int,
    causal: bool,
    window: int | None,
    offset: int,
    max_seqlen: int | None,
    softcap: float | None,
    scale: float | None,
) -> tuple[bool, int, int, int, float, float]:
    """What the raw ops take, in the order of their schema: 0 stands for no window, no cap, no known length."""
    scale = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
    return causal, window or 0, offset, max_seqlen or 0, softcap or 0.0, scale


def lse_shape(q: Tensor) -> tuple[int, ...]:
    """Of the log-sum-exp: [B, N, S], packed [N, T]."""
    return (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    bounds: tuple[Tensor | None, Tensor | None],
    max_seqlen: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Raises what `attention` documents; bounds are cu_seqlens and cu_seqlens_k."""
    check_bounds(q, *bounds, max_seqlen)
    checks.require_float(q=q)
    dims, form = (4, "[B, S, N, D]") if bounds[0] is None else (3, "packed [T, N, D] with cu_seqlens")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != dims:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: pass {form}")
        checks.require_same_kind(tensor, q, name, "q")
    tokens = q.shape[0] if bounds[0] is not None and bounds[1] is None else k.shape[-3]
    checks.require_shape(
        k, (*q.shape[:-3], tokens, k.shape[-2], q.shape[-1]), "k", f"q of shape {list(q.shape)}"
    )
    checks.require_like(v, k, "v", "k")
    check_options(q, q.shape[-2], k.shape[-2], window, softcap, sinks)


def check_options(
    q: Tensor, heads: int, kv_heads: int, window: int | None, softcap: float | None, sinks: Tensor | None
) -> None:
    """The part of `check` that has nothing to do with shapes of tensors; q is any on the device."""
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads: must be a multiple of the {kv_heads} heads of k")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1 (the token itself), or None for no limit")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be greater than 0, or None for no cap")
    if sinks is not None:
        checks.require_shape(sinks, (heads,), "sinks", f"q with {heads} heads")
        checks.require_same_device(sinks, q, "sinks", "q")


def check_bounds(
    q: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen: int | None
) -> None:
    """The part of `check` about packed documents; q is any tensor on the device."""
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(
                f"max_seqlen={max_seqlen} has a meaning with cu_seqlens only: pass both or neither"
            )
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k is given without cu_seqlens: pass both or neither")
        return
    if max_seqlen is not None and max_seqlen < 0:
        raise ValueError(f"max_seqlen={max_seqlen} must be at least 0: pass the longest document's length")
    for name, bounds in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if bounds is None:
            continue
        if bounds.dtype != torch.int32 or bounds.dim() != 1 or bounds.numel() < 1:
            shape = list(bounds.shape)
            raise ValueError(f"{name} is {bounds.dtype} {shape}: pass int32 [documents + 1]")
        checks.require_same_device(bounds, q, name, "q")
    if cu_seqlens_k is not None:
        checks.require_shape(cu_seqlens_k, tuple(cu_seqlens.shape), "cu_seqlens_k", "cu_seqlens")
