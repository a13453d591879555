"""AdamW on flat buffers in plain torch. Source: Loshchilov and Hutter, "Decoupled Weight Decay", 2019."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """One update in place; where `skip` is true every buffer keeps its bits (by selection, never times zero)."""
    wide = master.dtype
    lr, step = lr.to(torch.float64), step.to(torch.float64)
    step_size = (lr / (1 - beta1**step)).to(wide)
    root_correction = (1 - beta2**step).sqrt().to(wide)
    g = grads.to(wide) * clip_coefficient.to(wide)
    m = exp_avg * beta1 + g * (1 - beta1)
    v = exp_avg_sq * beta2 + g.square() * (1 - beta2)
    decayed = master * (1 - lr * weight_decay).to(wide)
    updated = decayed - step_size * m / (v.sqrt() / root_correction + eps)
    keep = skip.to(torch.bool)
    new_params = torch.where(keep, params, updated.to(params.dtype))
    master.copy_(torch.where(keep, master, updated))
    exp_avg.copy_(torch.where(keep, exp_avg, m))
    exp_avg_sq.copy_(torch.where(keep, exp_avg_sq, v))
    params.copy_(new_params)
