"""AdamW on the native library."""

from __future__ import annotations

import math

from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import DTYPES, address, threads
from megalite_kernels.reference import adamw as reference


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
    options = _options(lr, beta1, beta2, eps, weight_decay, step, clip_coefficient)
    _C.adamw(
        DTYPES[params.dtype], address(params), address(master), address(exp_avg), address(exp_avg_sq),
        address(grads), params.numel(), *options, threads(),
    )  # fmt: skip


def remainder_step_(
    params: Tensor,
    remainder: Tensor,
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
    """Backend "cpu" of `adamw_remainder_`."""
    if bool(skip):
        return
    options = _options(lr, beta1, beta2, eps, weight_decay, step, clip_coefficient)
    pointers = (address(params), address(remainder), address(exp_avg), address(exp_avg_sq), address(grads))
    _C.adamw_remainder(*pointers, params.numel(), *options, threads())


def stochastic_step_(
    params: Tensor,
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
    seed: Tensor,
) -> None:
    """Backend "cpu" of `adamw_stochastic_`."""
    if bool(skip):
        return
    options = _options(lr, beta1, beta2, eps, weight_decay, step, clip_coefficient)
    pointers = (address(params), address(exp_avg), address(exp_avg_sq), address(grads))
    _C.adamw_stochastic(*pointers, params.numel(), *options, int(reference.key(seed, step)), threads())


def _options(
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: Tensor,
    clip_coefficient: Tensor,
) -> tuple[float, ...]:
    """Fields of `AdamWOptions` in csrc/api.h."""
    rate, count = float(lr), float(step)
    decay, step_size = 1.0 - rate * weight_decay, rate / (1.0 - beta1**count)
    return beta1, beta2, eps, decay, step_size, math.sqrt(1.0 - beta2**count), float(clip_coefficient)
