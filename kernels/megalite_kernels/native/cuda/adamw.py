"""AdamW by the kernel of adamw.cuh: one launch, and nothing of a step reaches the host."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalite_kernels.native.cuda import runtime
from megalite_kernels.native.cuda.kernel import Kernel
from megalite_kernels.native.cuda.kernels import adamw as kernels

PARAMS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float"}


def step_(
    params: Tensor, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grads: Tensor, lr: Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float, step: Tensor, clip_coefficient: Tensor, skip: Tensor,
) -> None:  # fmt: skip
    """Backend "cuda" of `adamw_`; where master is params itself it is written once."""
    shared = params.dtype == master.dtype and params.data_ptr() == master.data_ptr()
    _update(
        kernels.step(PARAMS[params.dtype], master=not shared),
        (params, None if shared else master, exp_avg, exp_avg_sq, grads),
        (lr, step, clip_coefficient, skip, None),
        (beta1, beta2, eps, weight_decay),
    )


def remainder_step_(
    params: Tensor, remainder: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grads: Tensor, lr: Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float, step: Tensor, clip_coefficient: Tensor, skip: Tensor,
) -> None:  # fmt: skip
    """Backend "cuda" of `adamw_remainder_`."""
    _update(
        kernels.step("bf16", master=False, remainder=True),
        (params, remainder, exp_avg, exp_avg_sq, grads),
        (lr, step, clip_coefficient, skip, None),
        (beta1, beta2, eps, weight_decay),
    )


def stochastic_step_(
    params: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grads: Tensor, lr: Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float, step: Tensor, clip_coefficient: Tensor, skip: Tensor,
    seed: Tensor,
) -> None:  # fmt: skip
    """Backend "cuda" of `adamw_stochastic_`."""
    _update(
        kernels.step(PARAMS[params.dtype], master=False, stochastic=True),
        (params, None, exp_avg, exp_avg_sq, grads),
        (lr, step, clip_coefficient, skip, seed),
        (beta1, beta2, eps, weight_decay),
    )


def _update(
    kernel: Kernel,
    buffers: tuple[Tensor | None, ...],
    scalars: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    options: tuple[float, float, float, float],
) -> None:
    params = buffers[0]
    assert params is not None
    lr, step, clip, skip, seed = scalars
    if step.dtype not in (torch.float32, torch.int64):
        step = step.float() if step.is_floating_point() else step.long()
    beta1, beta2, eps, weight_decay = options
    arguments = (
        *buffers, lr.float(), step, clip.float(), skip.bool(), seed, params.numel(), int(step.dtype == torch.int64),
        beta1, 1.0 - beta1, _log(beta1), beta2, 1.0 - beta2, _log(beta2), eps, weight_decay,
    )  # fmt: skip
    runtime.launch(kernel, (kernels.blocks(params.numel()), 1, 1), arguments, params.device)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -1e3  # exp(-1e3) is 0, and so is 0^step
