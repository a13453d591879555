"""Other packages' ways to run the same ops, used where they are installed and run on the device.

Each is called as the case's own function is: with all inputs of the case, in order. None was run on a GPU here.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.environment import version

Call = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Peer:
    """One implementation by another package."""

    name: str
    package: str
    """Import name."""
    make: Callable[[], Call]
    """Imports the package; returns the function to time."""

    def unusable(self, device: str) -> str | None:
        """None if it can run on the device, else the reason."""
        if version(self.package) is None:
            return f"{self.package} is not installed"
        if device != "cuda":
            return f"{self.package} runs on GPUs only"
        try:
            self.make()
        except (ImportError, AttributeError) as error:
            return f"{self.package} does not have it: {error}"
        return None

    def build(self) -> Call:
        """The function to time."""
        return self.make()


def function(module: str, name: str) -> Call:
    """A function of an optional package, imported now."""
    found: Call = getattr(importlib.import_module(module), name)
    return found


def liger(name: str) -> Call:
    """Of Liger-Kernel's functional interface."""
    return function("liger_kernel.transformers.functional", name)


def _liger_rms_norm() -> Call:
    # In place it would write the gradient of one call over that of the next.
    call = liger("liger_rms_norm")
    return lambda x, weight: call(x, weight, 1e-6, in_place=False)


def _liger_residual_rms_norm() -> Call:
    call = liger("liger_fused_add_rms_norm")
    return lambda x, residual, weight: call(x, residual, weight, 1e-6, in_place=False)


def _liger_layer_norm() -> Call:
    call = liger("liger_layer_norm")
    return lambda x, weight, bias: call(x, weight, bias, 1e-5)


def _liger_rope() -> Call:
    call = liger("liger_rope")

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (torch.cat((table, table), -1).unsqueeze(0) for table in (cos, sin))
        q, k = call(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return run


def _liger_cross_entropy() -> Call:
    # It writes the gradient over its input, so it gets a copy; the copy's time is its own to save.
    call = liger("liger_cross_entropy")
    return lambda logits, target: call(logits.clone(), target)


def _quack_rms_norm() -> Call:
    call = function("quack", "rmsnorm")
    return lambda x, weight: call(x, weight, eps=1e-6)


def _quack_cross_entropy() -> Call:
    call = function("quack", "cross_entropy")
    return lambda logits, target: call(logits, target).sum() / (target != -100).sum()


def _cut_cross_entropy() -> Call:
    call = function("cut_cross_entropy", "linear_cross_entropy")
    return lambda x, weight, target: call(x, weight, target, impl="cce_exact")


def _flash_attention(**options: Any) -> Callable[[], Call]:
    def make() -> Call:
        call = function("flash_attn", "flash_attn_func")
        return lambda q, k, v: call(q, k, v, **options)

    return make


def _flash_attention_window() -> Call:
    from megalite_kernels.cases.attention import window_of

    call = function("flash_attn", "flash_attn_func")
    return lambda q, k, v: call(q, k, v, causal=True, window_size=(window_of({"S": q.shape[1]}) - 1, 0))


def _flash_attention_packed() -> Call:
    from megalite_kernels.cases.attention import document_bounds

    call = function("flash_attn", "flash_attn_varlen_func")

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        bounds = document_bounds(q.shape[0])
        longest = max(b - a for a, b in itertools.pairwise(bounds))
        out: Tensor = call(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)
        return out

    return run


def _apex_rms_norm() -> Call:
    call = function("apex.normalization.fused_layer_norm", "fused_rms_norm_affine")
    return lambda x, weight: call(x, weight, weight.shape, 1e-6)


def _apex_layer_norm() -> Call:
    call = function("apex.normalization.fused_layer_norm", "fused_layer_norm_affine")
    return lambda x, weight, bias: call(x, weight, bias, weight.shape, 1e-5)


LIGER, QUACK, APEX, FLASH = "liger", "quack", "apex", "flash_attn"

PEERS: dict[str, tuple[Peer, ...]] = {
    "rms_norm": (
        Peer(LIGER, "liger_kernel", _liger_rms_norm),
        Peer(QUACK, "quack", _quack_rms_norm),
        Peer(APEX, "apex", _apex_rms_norm),
    ),
    "rms_norm residual": (Peer(LIGER, "liger_kernel", _liger_residual_rms_norm),),
    "layer_norm": (
        Peer(LIGER, "liger_kernel", _liger_layer_norm),
        Peer(APEX, "apex", _apex_layer_norm),
    ),
    "swiglu pair": (Peer(LIGER, "liger_kernel", lambda: liger("liger_swiglu")),),
    "geglu pair": (Peer(LIGER, "liger_kernel", lambda: liger("liger_geglu")),),
    "relu_squared": (Peer(LIGER, "liger_kernel", lambda: liger("liger_relu_squared")),),
    "rope": (Peer(LIGER, "liger_kernel", _liger_rope),),
    "cross_entropy": (
        Peer(LIGER, "liger_kernel", _liger_cross_entropy),
        Peer(QUACK, "quack", _quack_cross_entropy),
    ),
    "linear_cross_entropy": (
        Peer(LIGER, "liger_kernel", lambda: liger("liger_fused_linear_cross_entropy")),
        Peer("cce", "cut_cross_entropy", _cut_cross_entropy),
    ),
    "attention causal": (Peer(FLASH, "flash_attn", _flash_attention(causal=True)),),
    "attention full": (Peer(FLASH, "flash_attn", _flash_attention(causal=False)),),
    "attention window": (Peer(FLASH, "flash_attn", _flash_attention_window),),
    "attention packed": (Peer(FLASH, "flash_attn", _flash_attention_packed),),
}
"""By case name."""
