"""Cases of the optimizer's ops: adamw_ and grad_norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels.cases.base import Case, Inputs, Shape, Work, choices, normal
from megalite_kernels.ops.adamw import adamw_
from megalite_kernels.ops.grad_norm import grad_norm
from megalite_kernels.reference import adamw as reference

SETTINGS: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SIZES: dict[str, Any] = {
    "check": {"n": 4099},
    "doctor": {"n": 1 << 22},
    "cpu": ({"n": 1 << 24},),
    "cuda": ({"n": 1 << 28},),
}


def _state(shape: Shape, generator: torch.Generator) -> Inputs:
    size, device = shape["n"], generator.device
    master = normal(generator, size)
    moments = [0.1 * normal(generator, size), 0.01 * normal(generator, size).square()]
    scalars = [
        torch.tensor(1e-2, device=device),
        torch.tensor(3, device=device),
        torch.tensor(0.25, device=device),
        torch.tensor(False, device=device),
    ]
    return Inputs([master.clone()], [master, *moments, 0.1 * normal(generator, size), *scalars])


def _ours(*tensors: Tensor) -> None:
    lr, step, clip, skip = tensors[5:]
    adamw_(*tensors[:5], lr=lr, step=step, clip_coefficient=clip, skip=skip, **SETTINGS)


def _plain(*tensors: Tensor) -> None:
    lr, step, clip, skip = tensors[5:]
    params, master, exp_avg, exp_avg_sq, grads = tensors[:5]
    reference.step_(
        params,
        master,
        exp_avg,
        exp_avg_sq,
        grads,
        lr,
        step=step,
        clip_coefficient=clip,
        skip=skip,
        **SETTINGS,
    )


def _torch_step(*tensors: Tensor) -> None:
    """torch's fused AdamW on the fp32 master, and the copy into the parameters."""
    params, master, exp_avg, exp_avg_sq, grads = tensors[:5]
    if grads.dtype != master.dtype:
        raise ValueError("master and grads have one dtype")
    torch._fused_adamw_(
        [master], [grads], [exp_avg], [exp_avg_sq], [], [tensors[6].float()], lr=tensors[5], beta1=SETTINGS["beta1"],
        beta2=SETTINGS["beta2"], weight_decay=SETTINGS["weight_decay"], eps=SETTINGS["eps"], amsgrad=False,
        maximize=False, grad_scale=None, found_inf=None,
    )  # fmt: skip
    params.copy_(master)


def _remainder_state(shape: Shape, generator: torch.Generator) -> Inputs:
    state = _state(shape, generator)
    remainder = choices(generator, 1 << 16, shape["n"]) - (1 << 15)
    return Inputs(state.leaves, [remainder.to(torch.int16), *state.fixed[1:]])


def _remainder(*tensors: Tensor) -> None:
    params, remainder, exp_avg, exp_avg_sq, grads, lr, step, clip, skip = tensors
    adamw_(
        params, None, exp_avg, exp_avg_sq, grads, lr=lr, step=step, clip_coefficient=clip, skip=skip,
        remainder=remainder, **SETTINGS,
    )  # fmt: skip


def _plain_remainder(*tensors: Tensor) -> None:
    """Of the same masters; in a wider type their update is not rounded to bf16."""
    params, remainder, exp_avg, exp_avg_sq, grads, lr, step, clip, skip = tensors
    options = {**SETTINGS, "step": step, "clip_coefficient": clip, "skip": skip}
    if params.dtype != torch.bfloat16:
        master = reference.join(params.bfloat16(), remainder).to(params.dtype)
        reference.step_(params, master, exp_avg, exp_avg_sq, grads, lr, **options)
    else:
        reference.remainder_step_(params, remainder, exp_avg, exp_avg_sq, grads, lr, **options)


def _torch_remainder(*tensors: Tensor) -> None:
    """torch's fused AdamW on the master put together, which is taken apart again."""
    params, remainder, *rest = tensors
    master = reference.join(params, remainder)
    _torch_step(params, master, *rest)
    high, low = reference.split(master)
    params.copy_(high)
    remainder.copy_(low)


def _remainder_work(shape: Shape, itemsize: int) -> Work:
    # parameter and remainder, two moments and the gradient in; all but the gradient out
    return Work(shape["n"] * (24 + 2 * itemsize), 0, 15 * shape["n"], 0)


def _stochastic_state(shape: Shape, generator: torch.Generator) -> Inputs:
    state = _state(shape, generator)
    return Inputs(state.leaves, [*state.fixed[1:], torch.tensor(11, device=generator.device)])


def _stochastic(*tensors: Tensor) -> None:
    lr, step, clip, skip, seed = tensors[4:]
    params, *state = tensors[:4]
    adamw_(params, None, *state, lr=lr, step=step, clip_coefficient=clip, skip=skip, seed=seed, **SETTINGS)


def _plain_stochastic(*tensors: Tensor) -> None:
    """The same random bits; for float64, where nothing is rounded, the plain update."""
    params, exp_avg, exp_avg_sq, grads, lr, step, clip, skip, seed = tensors
    options = {**SETTINGS, "step": step, "clip_coefficient": clip, "skip": skip}
    if params.dtype == torch.float64:
        reference.step_(params, params, exp_avg, exp_avg_sq, grads, lr, **options)
    else:
        reference.stochastic_step_(params, exp_avg, exp_avg_sq, grads, lr, seed=seed, **options)


def _torch_stochastic(*tensors: Tensor) -> None:
    """torch's fused AdamW on a wide copy, and random bits below the 16 that stay, as training code adds them."""
    params, exp_avg, exp_avg_sq, grads, lr, step = tensors[:6]
    wide = params.float()
    _torch_step(params, wide, exp_avg, exp_avg_sq, grads, lr, step)
    bits = torch.randint_like(wide, 1 << 16, dtype=torch.int32)
    params.copy_(bits.add_(wide.view(torch.int32)).bitwise_and_(-65536).view(torch.float32))


def _stochastic_work(shape: Shape, itemsize: int) -> Work:
    # parameter, two moments and the gradient in; parameter and two moments out
    return Work(shape["n"] * (20 + 2 * itemsize), 0, 20 * shape["n"], 0)


def _adamw_work(shape: Shape, itemsize: int) -> Work:
    # master, two moments and the gradient in; master, two moments and the parameter out
    return Work(shape["n"] * (28 + itemsize), 0, 15 * shape["n"], 0)


def _norm_inputs(shape: Shape, generator: torch.Generator) -> Inputs:
    return Inputs([normal(generator, shape["n"])])


def _plain_norm(grads: Tensor) -> Tensor:
    wide = torch.promote_types(grads.dtype, torch.float32)
    return torch.linalg.vector_norm(grads, dtype=wide)


CASES = (
    Case("adamw_", "adamw_", _ours, _plain, _state, _adamw_work, eager=_torch_step, grads=False,
         written=(0, 1, 2, 3), **SIZES),
    Case("adamw_", "adamw_ remainder", _remainder, _plain_remainder, _remainder_state, _remainder_work, grads=False,
         written=(0, 2, 3), dtypes=(torch.bfloat16,), eager=_torch_remainder, **SIZES),
    Case("adamw_", "adamw_ stochastic", _stochastic, _plain_stochastic, _stochastic_state, _stochastic_work,
         grads=False, written=(0, 1, 2), dtypes=(torch.bfloat16,), eager=_torch_stochastic, **SIZES),
    Case("grad_norm", "grad_norm", grad_norm, _plain_norm, _norm_inputs,
         lambda shape, itemsize: Work(shape["n"] * itemsize, 0, 2 * shape["n"], 0), grads=False, **SIZES),
)  # fmt: skip
