"""AdamW on the native library."""

from __future__ import annotations

import math

from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import DTYPES, address, threads


def step_(
    params: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grads: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: Tensor,
    clip_coefficient: Tensor,
    skip: Tensor,
) -> None:
    """Backend "cpu" of `adamw_`: the scalars are on the host already, so the selection is a return."""
    if bool(skip):
        return
    rate, count = float(lr), float(step)
    _C.adamw(
        DTYPES[params.dtype], address(params), address(master), address(exp_avg), address(exp_avg_sq),
        address(grads), params.numel(), beta1, beta2, eps, 1.0 - rate * weight_decay, rate / (1.0 - beta1**count),
        math.sqrt(1.0 - beta2**count), float(clip_coefficient), threads(),
    )  # fmt: skip
