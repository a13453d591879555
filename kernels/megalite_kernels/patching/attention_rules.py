"""Which modules are attention, and with what they are called for the check."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megalite_kernels.patching.attention import (
    AttentionSpec,
    RopeSpec,
    is_rotary,
    rotary_layout,
    widened,
)
from megalite_kernels.patching.check import Inputs, MismatchError, random_input, run
from megalite_kernels.patching.common import Proposal, projections
from megalite_kernels.patching.rebind import methods_behind_forward, used_names, wrapped
from megalite_kernels.patching.swap import Spec, apply, revert

ROWS = 11
"""Tokens of the check: fewer than any real window or context, odd, so that no dim is taken for another."""

FALLBACKS = "calls with a padding mask or for attention weights take the original"


def propose_attention(module: nn.Module) -> Proposal | None:
    """A module whose forward calls an attention function that has a fused stand-in."""
    spec = AttentionSpec()
    if not spec.methods(type(module)):
        named = "attention" in type(module).__name__.lower() and len(projections(module)) > 1
        return Proposal("attention", (), (), note="calls no attention function known here") if named else None
    return Proposal("attention", (spec,), calls(module), note=_note(module))


def propose_rope(module: nn.Module) -> Proposal | None:
    """A module whose forward calls a function of (q, k, cos, sin) that turns halves or neighbours."""
    functions = {
        value
        for method in methods_behind_forward(type(module)).values()
        for function in wrapped(method)
        for name in used_names(function) & set(function.__globals__)
        if is_rotary(value := function.__globals__[name])
    }
    if not functions:
        return None
    layouts = {rotary_layout(function) for function in functions}
    if None in layouts or len(layouts) > 1:
        return Proposal("rope", (), (), note="its rotary function has a layout of its own")
    layout = next(layout for layout in layouts if layout is not None)
    return Proposal("rope", (RopeSpec(*layout),), calls(module, layout))


def _note(module: nn.Module) -> str:
    probabilities = {
        float(value)
        for value in (getattr(module, "attention_dropout", 0.0), getattr(module, "dropout", 0.0))
        if isinstance(value, (int, float))
    }
    probabilities |= {child.p for child in module.children() if isinstance(child, nn.Dropout)}
    dropout = max(probabilities, default=0.0)
    return f"{FALLBACKS}; so do all in training with dropout {dropout}" if dropout else FALLBACKS


def calls(module: nn.Module, layout: tuple[bool, bool] = (False, True)) -> tuple[Inputs, ...]:
    """Calls of the forward without a mask and, where it takes one, with a causal mask."""
    sizes = projections(module)
    names = set(inspect.signature(module.forward).parameters)
    if not sizes:
        return ()
    hidden = next(iter(sizes.values()))[0]
    masks = (False, True) if "attention_mask" in names else (False,)
    pairs = _rotary_pairs(module, hidden, layout) if names & {"position_embeddings", "cos"} else 1
    return tuple(_call(module, hidden, mask, (pairs, *layout)) for mask in masks)


def _rotary_pairs(module: nn.Module, hidden: int, layout: tuple[bool, bool]) -> int:
    """How many features of a head are turned, in pairs: half of the head unless that fails."""
    heads = next((getattr(module, n) for n in ("num_heads", "n_head", "n_heads") if hasattr(module, n)), 1)
    head_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None) or hidden // heads
    for pairs in (head_dim // 2, head_dim // 4, head_dim // 8):
        try:
            run(module, _call(module, hidden, False, (pairs, *layout)), torch.float32, gradients=False)
            return pairs
        except Exception:  # the module may fail in any way on angles of a wrong size
            continue
    return head_dim // 2


def _call(module: nn.Module, hidden: int, masked: bool, rotary: tuple[int, bool, bool]) -> Inputs:
    parameters = list(inspect.signature(module.forward).parameters.values())

    def inputs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = random_input(module, 2, ROWS, hidden).bfloat16().to(dtype)
        given: dict[str, Any] = {"attention_mask": causal_mask(module, x) if masked else None}
        cos, sin = angles(x, *rotary)
        given |= {"position_embeddings": (cos, sin), "cos": cos, "sin": sin}
        chosen = {
            p.name: given.get(p.name) for p in parameters[1:] if p.name in given or p.default is p.empty
        }
        return (x,), {n: v for n, v in chosen.items() if n not in ("args", "kwargs")}

    return inputs


def angles(x: Tensor, pairs: int, interleaved: bool, doubled: bool) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, ROWS, features], rounded as a 16-bit model's are."""
    position = torch.arange(ROWS, device=x.device)[:, None]
    half = position * torch.linspace(1.0, 0.01, max(pairs, 1), device=x.device)
    full = widened(half, interleaved, doubled)[None]
    return full.cos().bfloat16().to(x.dtype), full.sin().bfloat16().to(x.dtype)


def causal_mask(module: nn.Module, x: Tensor) -> Tensor:
    """[2, 1, ROWS, ROWS] within the module's window, of the kind its attention implementation takes."""
    config = getattr(module, "config", None)
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    position = torch.arange(ROWS, device=x.device)
    seen = position[None, :] <= position[:, None]
    if window is not None:
        seen &= position[None, :] > position[:, None] - window
    seen = seen.expand(2, 1, ROWS, ROWS)
    if getattr(config, "_attn_implementation", "eager") == "sdpa":
        return seen.clone()
    return torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill_(
        ~seen, torch.finfo(x.dtype).min
    )


class _Recorder(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def require_reached(module: nn.Module, spec: Spec, calls: tuple[Inputs, ...]) -> None:
    """Under the spec, the fused op runs in at least one of these calls.

    Raises:
        MismatchError: it doesn't, so nothing would be gained.
    """
    op = {AttentionSpec: "megalite::attention_fwd", RopeSpec: "megalite::rope_fwd"}.get(type(spec))
    if op is None:
        return
    recorder = _Recorder()
    apply(module, spec)
    try:
        with recorder:
            for inputs in calls:
                run(module, inputs, torch.float32, gradients=False)
    finally:
        revert(module, spec)
    if op not in recorder.names:
        chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
        why = f" (its implementation is {chosen!r})" if chosen else ""
        raise MismatchError(f"its forward comes to no call that the fused op can do{why}")
