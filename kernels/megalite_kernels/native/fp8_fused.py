"""Norms and activations with their output in FP8 beside it, on the native library: its own kernels, then plain torch.

FP8 is emulated on CPUs to try its numerics, so the values must be those of the norms there, and speed is no aim.
"""

from __future__ import annotations

from megalite_kernels.native import activation
from megalite_kernels.native import layer_norm as layer
from megalite_kernels.native import rms_norm as rms
from megalite_kernels.reference.fp8_fused import OneAfterTheOther

_OPS = OneAfterTheOther(rms, layer, activation.forward, activation.packed_forward)
rms_norm, rms_norm_residual = _OPS.rms_norm, _OPS.rms_norm_residual
layer_norm, layer_norm_residual = _OPS.layer_norm, _OPS.layer_norm_residual
forward, packed_forward = _OPS.forward, _OPS.packed_forward
