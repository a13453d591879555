"""Registers the optional back-ends of other packages, which `use_backend` reaches and nothing chooses by itself."""

from __future__ import annotations

from megalite_kernels.backend import register_lazy
from megalite_kernels.peers import apex, flash_attn


def register_peers() -> None:
    """Add "flash_attn", "flash_attn_3", "flash_attn_4" and "apex" to the ops that they can run."""
    place = "megalite_kernels.peers.flash_attn"
    for name, suffix in (("flash_attn", ""), ("flash_attn_3", "_3"), ("flash_attn_4", "_4")):
        newest = name == "flash_attn_4"
        forward = flash_attn.supports_forward_4 if newest else flash_attn.supports_forward
        backward = flash_attn.supports_backward_4 if newest else flash_attn.supports_backward
        module = flash_attn.MODULES[name]
        register_lazy("attention_fwd", name, f"{place}:forward{suffix}", requires=module, supports=forward)
        register_lazy("attention_bwd", name, f"{place}:backward{suffix}", requires=module, supports=backward)
    for op, function, supports in (
        ("rms_norm_fwd", "rms_forward", apex.supports_rms),
        ("rms_norm_bwd", "rms_backward", apex.supports_rms_backward),
        ("layer_norm_fwd", "layer_forward", apex.supports_layer),
        ("layer_norm_bwd", "layer_backward", apex.supports_layer_backward),
    ):
        target = f"megalite_kernels.peers.apex:{function}"
        register_lazy(op, "apex", target, requires=apex.MODULE, supports=supports)
