"""Back-ends "flash_attn", "flash_attn_3" and "flash_attn_4": the attention kernels of the flash-attention project.

They are the packages' low-level forwards and backwards, which take an outside output and log-sum-exp: flash-attn 2.7
to 2.8, the `flash_attn_interface` of flash-attn 3, `flash_attn.cute` of flash-attn 4. Not run on a GPU here.
Their causal mask ends at the last query and key, as ours does, and so does the log-sum-exp (natural logarithm).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

MODULES = {
    "flash_attn": "flash_attn.flash_attn_interface",
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn.cute.interface",
}
"""Back-end to the module that it needs."""


def supports_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int,
    offset: int,
    max_seqlen: int,
    softcap: float,
    scale: float,
) -> str | None:
    """None if flash-attn 2 and 3 can do it, else the reason."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"takes head dims that are multiples of 8 up to 256, not {q.shape[-1]}"
    if sinks is not None:
        return "has no sinks"
    if cu_seqlens_k is not None:
        return "takes no bounds of their own for the keys"
    if not q.numel() or not k.numel():
        return "takes no empty tensors"
    masked = causal or window
    if masked and offset:
        return f"takes no offset of the queries ({offset})"
    if masked and cu_seqlens is None and q.shape[1] > k.shape[1]:
        return "takes no queries that see no key"
    return None if q.device.type == "cuda" else f"runs on GPUs, q is on {q.device}"


def supports_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> str | None:
    """As `supports_forward`; the log-sum-exp gets no gradient either."""
    if dlse is not None:
        return "has no gradient through the log-sum-exp"
    return supports_forward(q, k, v, *rest[2:])


def supports_forward_4(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    """As `supports_forward`; the backward of flash-attn 4 has neither window nor soft-cap in every version."""
    if rest[4] or rest[7]:
        return "has no window and no softcap in its backward"
    return supports_forward(q, k, v, *rest)


def supports_backward_4(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> str | None:
    """As `supports_backward`, for flash-attn 4."""
    if dlse is not None:
        return "has no gradient through the log-sum-exp"
    return supports_forward_4(q, k, v, *rest[2:])


def _windows(causal: bool, window: int) -> tuple[int, int]:
    """Keys to the left and right of a query's own that it sees; -1 is all of them."""
    back = window - 1 if window else -1
    return back, 0 if causal else back


def _longest(q: Tensor, max_seqlen: int) -> int:
    return max_seqlen or q.shape[0]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int,
    offset: int,
    max_seqlen: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`attention_fwd` by flash-attn 2."""
    module = importlib.import_module(MODULES["flash_attn"])
    left, right = _windows(causal, window)
    options = {
        "dropout_p": 0.0, "softmax_scale": scale, "causal": causal, "window_size_left": left,
        "window_size_right": right, "softcap": softcap, "alibi_slopes": None, "return_softmax": False,
    }  # fmt: skip
    if cu_seqlens is None:
        out, lse, *_ = module._flash_attn_forward(q, k, v, **options)
    else:
        longest = _longest(q, max_seqlen)
        out, lse, *_ = module._flash_attn_varlen_forward(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options
        )
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int,
    offset: int,
    max_seqlen: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`attention_bwd` by flash-attn 2, in its deterministic variant."""
    module = importlib.import_module(MODULES["flash_attn"])
    left, right = _windows(causal, window)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    options = {
        "dropout_p": 0.0, "softmax_scale": scale, "causal": causal, "window_size_left": left,
        "window_size_right": right, "softcap": softcap, "alibi_slopes": None, "deterministic": True,
    }  # fmt: skip
    if cu_seqlens is None:
        module._flash_attn_backward(dout, q, k, v, out, lse, *grads, **options)
    else:
        longest = _longest(q, max_seqlen)
        bounds = (cu_seqlens, cu_seqlens, longest, longest)
        module._flash_attn_varlen_backward(dout, q, k, v, out, lse, *grads, *bounds, **options)
    return grads[0], grads[1], grads[2], q.new_empty(0)


def _bounds(q: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> dict[str, Any]:
    """Packing of flash-attn 3 and 4, by keyword."""
    if cu_seqlens is None:
        return {}
    longest = _longest(q, max_seqlen)
    return {
        "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": longest, "max_seqlen_k": longest,
    }  # fmt: skip


def forward_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int,
    offset: int,
    max_seqlen: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`attention_fwd` by flash-attn 3 (Hopper)."""
    module = importlib.import_module(MODULES["flash_attn_3"])
    left, right = _windows(causal, window)
    out, lse, *_ = module._flash_attn_forward(
        q, k, v, **_bounds(q, cu_seqlens, max_seqlen), softmax_scale=scale, causal=causal,
        window_size_left=left, window_size_right=right, softcap=softcap,
    )  # fmt: skip
    return out, lse


def backward_3(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int,
    offset: int,
    max_seqlen: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`attention_bwd` by flash-attn 3, in its deterministic variant."""
    module = importlib.import_module(MODULES["flash_attn_3"])
    left, right = _windows(causal, window)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    module._flash_attn_backward(
        dout, q, k, v, out, lse, **_bounds(q, cu_seqlens, max_seqlen), dq=dq, dk=dk, dv=dv, softmax_scale=scale,
        is_causal=causal, window_size_left=left, window_size_right=right, softcap=softcap, deterministic=True,
    )  # fmt: skip
    return dq, dk, dv, q.new_empty(0)


def forward_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int,
    offset: int,
    max_seqlen: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`attention_fwd` by flash-attn 4 (Hopper, Blackwell)."""
    module = importlib.import_module(MODULES["flash_attn_4"])
    bounds = _bounds(q, cu_seqlens, max_seqlen)
    out, lse, *_ = module._flash_attn_fwd(
        q, k, v, **bounds, softmax_scale=scale, causal=causal, return_lse=True
    )
    return out, lse


def backward_4(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int,
    offset: int,
    max_seqlen: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`attention_bwd` by flash-attn 4, which adds dq in no fixed order: not the same bits on every run."""
    module = importlib.import_module(MODULES["flash_attn_4"])
    bounds = {} if cu_seqlens is None else {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    dq, dk, dv, *_ = module._flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=scale, causal=causal, **bounds
    )
    return dq, dk, dv, q.new_empty(0)
