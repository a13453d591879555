"""Attention and rotary embedding of any codebase: a module's own forward, with the two functions replaced.

Three ways to call attention are known: torch's scaled_dot_product_attention (nanoGPT and most others), a registry with
`get_interface` (Hugging Face), and a function of (module, query, key, value, attention_mask). Rotary embedding is a
function of (q, k, cos, sin). A call that the fused op can't do goes to the function that was there.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megalite_kernels.ops.attention import attention
from megalite_kernels.ops.rope import rope
from megalite_kernels.patching.common import autocast, plain
from megalite_kernels.patching.masks import is_plain_causal
from megalite_kernels.patching.rebind import Replace, methods_behind_forward, rebind, torch_namespace
from megalite_kernels.patching.swap import Methods, Spec

SDPA = "scaled_dot_product_attention"
SDPA_OPTIONS = {"attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}
UNKNOWN_TO_US = ("position_bias", "cache", "head_mask", "block_mask", "score_mod")
"""Options of attention functions that change the result in ways the fused op does not know."""

FIRST_FIVE = ("module", "query", "key", "value", "attention_mask")


@dataclass(frozen=True)
class AttentionSpec(Spec):
    """The module's methods with fused attention in the place of the attention they call."""

    first_output_only: ClassVar[bool] = True  # attention probabilities, which nobody asked for, are not made

    def methods(self, cls: type[nn.Module]) -> Methods:
        return _rebound(cls, replace_attention)


@dataclass(frozen=True)
class RopeSpec(Spec):
    """The module's methods with the fused rotary embedding in the place of theirs."""

    interleaved: bool
    doubled: bool
    """Whether the module's cosines and sines have one column per feature, and not one per pair."""

    def methods(self, cls: type[nn.Module]) -> Methods:
        def replace(name: str, value: Any, names: frozenset[str]) -> Any:
            if not is_rotary(value):
                return value
            return functools.partial(fused_rotary, value, (self.interleaved, self.doubled))

        return _rebound(cls, replace)


def _rebound(cls: type[nn.Module], replace: Replace) -> Methods:
    found = {name: rebind(method, replace) for name, method in methods_behind_forward(cls).items()}
    return {name: method for name, method in found.items() if method is not None}


def replace_attention(name: str, value: Any, names: frozenset[str]) -> Any:
    """What stands for a global of an attention module (see `rebind.Replace`)."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if value is sdpa:
        return fused_sdpa
    if isinstance(value, types.ModuleType):
        return torch_namespace(value, names, {SDPA: fused_sdpa})
    if is_registry(value):
        return Registry(value)
    if isinstance(value, types.FunctionType) and _first_names(value, 5) == FIRST_FIVE:
        return functools.partial(fused_interface, value, "eager")
    return value


def is_registry(value: Any) -> bool:
    """Whether this maps names of attention implementations to functions, as Hugging Face's does."""
    return not isinstance(value, type) and callable(getattr(type(value), "get_interface", None))


def is_rotary(value: Any) -> bool:
    """Whether this is a function of (q, k, cos, sin, ...)."""
    return isinstance(value, types.FunctionType) and _first_names(value, 4)[2:] == ("cos", "sin")


def _first_names(function: Callable[..., Any], count: int) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)[:count]


class Registry:
    """Stands for a registry of attention functions: each function comes with the fused op before it."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def get_interface(self, implementation: Any, default: Any = None) -> Callable[..., Any]:
        """The function of this name, behind the fused op."""
        if isinstance(default, functools.partial) and default.func is fused_interface:
            default = default.args[0]
        found = self.original.get_interface(implementation, default)
        return functools.partial(fused_interface, found, implementation)

    def __getitem__(self, implementation: Any) -> Callable[..., Any]:
        return functools.partial(fused_interface, self.original[implementation], implementation)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def _shapes_fit(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether [B, heads, S, D] tensors are such as `attention` takes."""
    if not (q.dim() == 4 and plain(q, k, v) and q.dtype == k.dtype == v.dtype):
        return False
    same = k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    return same and q.shape[1] % k.shape[1] == 0


def fused_sdpa(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """torch's scaled_dot_product_attention on the fused op, where that can do the call."""
    options = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)), **kwargs}
    fits = not options.get("dropout_p") and set(options) <= SDPA_OPTIONS and len(args) <= 3
    causal, mask = bool(options.get("is_causal", False)), options.get("attn_mask")
    masked = mask is not None and not causal and is_plain_causal(mask, query.shape[-2], key.shape[-2], None)
    fits &= mask is None or masked
    q, k, v = autocast(query, key, value) if plain(query, key, value) else (query, key, value)
    # One key head for all queries is a broadcast to torch, other numbers must be asked for.
    grouped = k.shape[-3:-2] in (q.shape[-3:-2], (1,)) or options.get("enable_gqa", False)
    # torch's causal mask starts at the first key, ours ends at the last: the same for equal lengths only.
    if not (fits and grouped and _shapes_fit(q, k, v)) or (causal and q.shape[2] != k.shape[2]):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    out = attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        causal=causal or masked,
        scale=options.get("scale"),
    )
    return out.transpose(1, 2)


def fused_interface(
    fallback: Callable[..., Any],
    implementation: str | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **options: Any,
) -> Any:
    """Hugging Face's attention function on the fused op; returns ([B, S, N, D], None), or what `fallback` does."""
    plan = _plan(implementation, module, (query, key, value), attention_mask, options)
    if plan is None or args:
        return fallback(module, query, key, value, attention_mask, *args, **options)
    q, k, v = autocast(query, key, value)
    if plan["upper_left"]:
        k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    out = attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        causal=plan["causal"],
        window=plan["window"],
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
        scale=options.get("scaling"),
    )
    return out, None


def _plan(
    implementation: str | None,
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Any,
    options: dict[str, Any],
) -> dict[str, Any] | None:
    """How the fused op does this call, or None where it must not."""
    unknown = any(options.get(name) is not None for name in UNKNOWN_TO_US)
    if implementation not in ("sdpa", "eager") or options.get("dropout") or unknown or not plain(*tensors):
        return None
    if not _shapes_fit(*autocast(*tensors)) or (implementation == "eager" and wants_weights(options)):
        return None
    rows, keys = tensors[0].shape[2], tensors[1].shape[2]
    if mask is None:
        declared = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if declared is None else declared
        causal = bool(causal) and rows > 1 and implementation == "sdpa"
        return {"causal": causal, "window": None, "upper_left": causal and keys > rows}
    window = options.get("sliding_window")
    if not is_plain_causal(mask, rows, keys, window):
        return None
    return {"causal": True, "window": window if window and window < keys else None, "upper_left": False}


def wants_weights(options: dict[str, Any]) -> bool:
    """Whether the caller asked for the attention probabilities, which the fused op never has."""
    if options.get("output_attentions"):
        return True
    if torch.compiler.is_compiling():
        return False
    return any("attentions" in key for key in _collected())


def _collected() -> tuple[str, ...]:
    """What Hugging Face's output capture collects at the moment, if that machinery is loaded."""
    import sys

    capture = sys.modules.get("transformers.utils.output_capturing")
    active = getattr(capture, "_active_collector", None)
    collected = active.get() if active is not None else None
    return tuple(collected or ())


def fused_rotary(
    original: Callable[..., Any],
    layout: tuple[bool, bool],
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`rope` on [B, heads, S, D] (unsqueeze_dim=1) or [B, S, heads, D] (2); layout is (interleaved, doubled)."""
    interleaved, doubled = layout
    dim = options.get("unsqueeze_dim", 1)
    fits = not args and set(options) <= {"unsqueeze_dim"} and dim in (1, 2)
    if not fits or not _angles_fit(q, k, cos, sin, 3 - dim, doubled):
        result: tuple[Tensor, Tensor] = original(q, k, cos, sin, *args, **options)
        return result
    step = slice(None)
    if doubled:
        step = slice(None, None, 2) if interleaved else slice(cos.shape[-1] // 2)
    one_for_all = cos.shape[0] == 1
    cos, sin = ((x[0] if one_for_all else x)[..., step].float().contiguous() for x in (cos, sin))
    if dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    q, k = rope(q, k, cos, sin, interleaved=interleaved)
    return (q.transpose(1, 2), k.transpose(1, 2)) if dim == 1 else (q, k)


def _angles_fit(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, length_dim: int, doubled: bool) -> bool:
    if not plain(q, k, cos, sin) or q.dim() != 4 or cos.dim() != 3 or q.dtype != k.dtype:
        return False
    sizes = cos.shape == sin.shape and cos.shape[0] in (1, q.shape[0]) and cos.shape[1] == q.shape[length_dim]
    features = cos.shape[2] if doubled else 2 * cos.shape[2]
    return sizes and features == q.shape[3] == k.shape[3] and k.shape[length_dim] == q.shape[length_dim]


def rotary_layout(original: Callable[..., Any]) -> tuple[bool, bool] | None:
    """(interleaved, doubled) of a rotary function, found by trying; None if it does something else."""
    source = torch.Generator().manual_seed(22)
    q, k = (torch.randn(2, heads, 5, 8, generator=source) for heads in (4, 2))
    half = torch.randn(2, 5, 4, generator=source)
    for layout in itertools.product((False, True), (True, False)):
        full = widened(half, *layout)
        try:
            theirs = original(q, k, full.cos(), full.sin())
            ours = fused_rotary(original, layout, q, k, full.cos(), full.sin())
            if all(torch.allclose(a, b, atol=1e-5) for a, b in zip(theirs, ours, strict=True)):
                return layout
        except Exception:  # a function of another kind may fail in any way
            continue
    return None


def widened(half: Tensor, interleaved: bool, doubled: bool) -> Tensor:
    """Angles of pairs as a module of this layout has them."""
    if not doubled:
        return half
    return half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)
