"""AdamW over flat buffers, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels._library import define
from megalite_kernels.backend import register, register_lazy
from megalite_kernels.ops import checks
from megalite_kernels.ops.cuda_support import cuda_supports
from megalite_kernels.ops.native_support import NATIVE, native_supports
from megalite_kernels.ops.triton_support import TRITON, triton_supports
from megalite_kernels.reference import adamw as reference


def adamw_(
    params: Tensor,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grads: Tensor,
    *,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: Tensor,
    clip_coefficient: Tensor,
    skip: Tensor,
    remainder: Tensor | None = None,
    seed: Tensor | None = None,
) -> None:
    """One AdamW update of every element of flat buffers, in one pass, written in place.

    With g = clip_coefficient * grads: `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
    `master = master (1 - lr wd) - lr / (1 - b1^step) * m / (sqrt(v / (1 - b2^step)) + eps)`, and params gets
    master rounded to its dtype. Where `skip` is true no buffer changes a bit, whatever grads hold.

    With remainder, bf16 params and the remainder's 16 bits are the fp32 master, to the bit, in 4 bytes instead of 6
    (`reference.adamw`: `split` makes them, `join` the master). A master half-way between two bf16 numbers is rounded
    away from zero; nothing else differs from a master of its own.

    With neither, bf16 params are updated themselves and rounded up or down at random, with expectation equal to
    the unrounded value: plain rounding would lose every update below 1/256 of its parameter. The random bits
    depend on (seed, step, index in the buffer) alone and are the same on every backend.

    Args:
        params: [n], any float dtype: what the model computes with.
        master, exp_avg, exp_avg_sq, grads: [n] fp32. `master` may be `params` itself when that is fp32, or None.
        remainder: [n] int16 instead of a master, for bf16 params.
        lr, clip_coefficient: 0-dim tensors on the device (no host round trip, no recompilation).
        step: 0-dim, number of this update, from 1.
        skip: 0-dim bool.
        seed: 0-dim int64 on the device, with neither of them only; a different one for each buffer.

    Raises:
        ValueError: shapes, dtypes, devices or a coefficient is out of its range, or not just one of master, remainder
            and seed is given.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "grads": grads}
    _check_buffers(params, {"master": master, "remainder": remainder, **state})
    scalars = {"lr": lr, "step": step, "clip_coefficient": clip_coefficient, "skip": skip}
    _check_scalars(params, scalars if seed is None else {**scalars, "seed": seed})
    _check_coefficients(beta1, beta2, eps, weight_decay)
    _check_rule(params, {"master": master, "remainder": remainder, "seed": seed})
    options = (lr, beta1, beta2, eps, weight_decay, step, clip_coefficient, skip)
    if master is not None:
        _step_(params, master, exp_avg, exp_avg_sq, grads, *options)
    elif remainder is not None:
        _remainder_step_(params, remainder, exp_avg, exp_avg_sq, grads, *options)
    else:
        _stochastic_step_(params, exp_avg, exp_avg_sq, grads, *options, seed)


def _check_rule(params: Tensor, rules: dict[str, Tensor | None]) -> None:
    """One of master, remainder and seed decides how params are rounded."""
    given = [name for name, tensor in rules.items() if tensor is not None]
    if len(given) != 1:
        raise ValueError(
            f"{' and '.join(given) or 'nothing'} given: pass a master, its remainder, or a seed for stochastic "
            "rounding: one of the three"
        )
    if given != ["master"] and params.dtype != torch.bfloat16:
        raise ValueError(f"params has dtype {params.dtype}: a {given[0]} instead of a master is for bfloat16")
    seed = rules["seed"]
    if seed is not None and seed.dtype != torch.int64:
        raise ValueError(f"seed has dtype {seed.dtype}: pass a 0-dim int64 tensor")


def _check_scalars(params: Tensor, scalars: dict[str, Tensor]) -> None:
    for name, scalar in scalars.items():
        checks.require_shape(scalar, (), name, "a 0-dim tensor on the device")
        checks.require_same_device(scalar, params, name, "params")


def _check_coefficients(beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name}={value} must be at least 0 and less than 1")
    checks.require_range(eps, "eps")
    checks.require_range(weight_decay, "weight_decay")


def _check_buffers(params: Tensor, state: dict[str, Tensor | None]) -> None:
    checks.require_float(params=params)
    for name, buffer in {"params": params, **state}.items():
        if buffer is None:
            continue
        checks.require_shape(buffer, (params.numel(),), name, "a flat buffer like params")
        checks.require_same_device(buffer, params, name, "params")
        if not buffer.is_contiguous():
            raise ValueError(f"{name} has stride {buffer.stride()}: pass a contiguous flat buffer")
        wanted = torch.int16 if name == "remainder" else torch.float32
        if buffer is not params and buffer.dtype != wanted:
            raise ValueError(
                f"{name} has dtype {buffer.dtype}: remainders are int16"
                if name == "remainder"
                else f"{name} has dtype {buffer.dtype}: optimizer state and gradients are fp32"
            )


_step_ = define(
    "adamw_(Tensor(a!) params, Tensor(b!) master, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor grads, "
    "Tensor lr, float beta1, float beta2, float eps, float weight_decay, Tensor step, Tensor clip_coefficient, "
    "Tensor skip) -> ()",
    fake=lambda *args: None,
)
_remainder_step_ = define(
    "adamw_remainder_(Tensor(a!) params, Tensor(b!) remainder, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, "
    "Tensor grads, Tensor lr, float beta1, float beta2, float eps, float weight_decay, Tensor step, "
    "Tensor clip_coefficient, Tensor skip) -> ()",
    fake=lambda *args: None,
)
_stochastic_step_ = define(
    "adamw_stochastic_(Tensor(a!) params, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grads, Tensor lr, "
    "float beta1, float beta2, float eps, float weight_decay, Tensor step, Tensor clip_coefficient, Tensor skip, "
    "Tensor seed) -> ()",
    fake=lambda *args: None,
)
for _op, _name in (
    ("adamw_", "step_"),
    ("adamw_remainder_", "remainder_step_"),
    ("adamw_stochastic_", "stochastic_step_"),
):
    register(_op, "reference", getattr(reference, _name))
    register_lazy(
        _op, "cpu", f"megalite_kernels.native.adamw:{_name}", requires=NATIVE, supports=native_supports
    )
    register_lazy(
        _op, "triton", f"megalite_kernels.triton.adamw:{_name}", requires=TRITON, supports=triton_supports
    )
    register_lazy(_op, "cuda", f"megalite_kernels.native.cuda.adamw:{_name}", supports=cuda_supports)
