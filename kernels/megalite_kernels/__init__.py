"""Fused kernels for transformers, usable from any codebase.

Every function picks the best implementation for its tensors' device; `explain()` says which and why, and
`use_backend(name)` forces one. Importing needs torch and numpy alone, builds nothing and touches no device.
"""

from __future__ import annotations

from megalite_kernels.backend import explain, use_backend
from megalite_kernels.ops.activation import geglu, gelu, relu_squared, swiglu
from megalite_kernels.ops.adamw import adamw_
from megalite_kernels.ops.attention import attention
from megalite_kernels.ops.cross_entropy import cross_entropy
from megalite_kernels.ops.embedding import embedding
from megalite_kernels.ops.fp8_activation import fp8_activation
from megalite_kernels.ops.fp8_linear import fp8_linear
from megalite_kernels.ops.fp8_norm import fp8_layer_norm, fp8_rms_norm
from megalite_kernels.ops.grad_norm import grad_norm
from megalite_kernels.ops.layer_norm import layer_norm
from megalite_kernels.ops.linear import linear
from megalite_kernels.ops.linear_cross_entropy import linear_cross_entropy
from megalite_kernels.ops.packed_attention import packed_attention
from megalite_kernels.ops.peers import register_peers
from megalite_kernels.ops.rms_norm import rms_norm
from megalite_kernels.ops.rope import rope, rope_
from megalite_kernels.patch import patch, patched, unpatch

__all__ = [
    "adamw_",
    "attention",
    "cross_entropy",
    "embedding",
    "explain",
    "fp8_activation",
    "fp8_layer_norm",
    "fp8_linear",
    "fp8_rms_norm",
    "geglu",
    "gelu",
    "grad_norm",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "packed_attention",
    "patch",
    "patched",
    "relu_squared",
    "rms_norm",
    "rope",
    "rope_",
    "swiglu",
    "unpatch",
    "use_backend",
]

register_peers()
