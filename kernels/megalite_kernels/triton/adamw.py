"""AdamW over flat buffers in one pass; learning rate, step, clipping and skip are read on the device.

Nothing of a step reaches the host, so a CUDA graph may replay it. The corrections 1 - beta^step are made in the kernel:
in float32 a subtraction of exp2(step * log2(beta)) from 1 is wrong by 1.3e-5 at beta = 0.999, step 1, and by 1.7e-4 at
0.9999; a series of expm1 keeps them within 2.3e-7 at every step from 1 to 1e6.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.triton.launch import Launch, Table, launch

# 8 elements a thread: two 16-byte accesses to each fp32 buffer, one to bf16 parameters.
STEP = Table("adamw_", {"default": Launch({"BLOCK": 1024}, num_warps=4, num_stages=1)})
ALIGNED = 16
"""Elements: where a size is a multiple, Triton proves that its mask is whole for each vector access."""


@triton.jit
def bias_correction(step, LOG_BETA: tl.constexpr):
    """1 - beta^step, fp32: -expm1(step * log(beta)), by its Taylor series where 1 - exp would cancel."""
    x = tl.maximum(step * LOG_BETA, -100.0)
    series = 1.0 + x / 9.0
    for divisor in tl.static_range(8, 1, -1):
        series = 1.0 + x / divisor * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))  # the tenth term is 3e-10 at -0.5


@triton.jit
def mix(x):
    """The reference's bijection of 32-bit words."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def rounding_bits(seed, step, index):
    """16 random bits in uint32 for each int64 index, those of `reference.adamw.rounding_bits`."""
    key = mix(seed.to(tl.uint32) + 0x9E3779B9)
    key = mix(key + (seed >> 32).to(tl.uint32))
    key = mix(key + step.to(tl.uint32))
    key = mix(key + (step >> 32).to(tl.uint32))
    word = mix(key + (index >> 32).to(tl.uint32))
    return mix(mix(index.to(tl.uint32) ^ word) + word) >> 16


@triton.jit
def round_stochastic(x, bits):
    """fp32 to bf16, up or down by random bits; infinities and NaN as usual."""
    pattern = x.to(tl.uint32, bitcast=True)
    raised = ((pattern + bits) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where((pattern & 0x7F800000) != 0x7F800000, raised, x.to(tl.bfloat16))


@triton.jit
def split(x):
    """fp32 as its pattern's bf16 part, to the nearest, and the int16 rest of it; NaN without its payload."""
    pattern = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
    high = ((pattern + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return high, pattern.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def join(high, low):
    """What `split` was given."""
    pattern = (high.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low.to(tl.int32)
    return pattern.to(tl.float32, bitcast=True)


@triton.jit
def step_kernel(
    params_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, grads_ptr, lr_ptr, step_ptr, clip_ptr, skip_ptr, seed_ptr,
    size, first_index,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, EPS: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr, HAS_MASTER: tl.constexpr, REMAINDER: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid [size / BLOCK]; a program owns BLOCK elements of every buffer.

    Reads master, two moments and the gradient, writes master, the moments and the parameters: 28 bytes and a
    parameter each; with stochastic rounding, which has no master, 20 and twice a parameter. With REMAINDER the master's
    place is taken by int16 (28 bytes in all). Computed in fp32. Where skip is true the size is taken as 0: nothing is
    read or written.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < tl.where(tl.load(skip_ptr), 0, size)
    lr, step = tl.load(lr_ptr).to(tl.float32), tl.load(step_ptr)
    count = step.to(tl.float32)
    step_size = lr / bias_correction(count, LOG_BETA1)
    root_correction = tl.sqrt(bias_correction(count, LOG_BETA2))
    if REMAINDER:
        high = tl.load(params_ptr + index, mask=mask, other=0.0)
        value = join(high, tl.load(master_ptr + index, mask=mask, other=0))
    else:
        value_ptr = master_ptr if HAS_MASTER else params_ptr
        value = tl.load(value_ptr + index, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grads_ptr + index, mask=mask, other=0.0) * tl.load(clip_ptr).to(tl.float32)
    m = tl.load(exp_avg_ptr + index, mask=mask, other=0.0) * BETA1 + g * (1.0 - BETA1)
    v = tl.load(exp_avg_sq_ptr + index, mask=mask, other=0.0) * BETA2 + g * g * (1.0 - BETA2)
    value = value * (1.0 - lr * WEIGHT_DECAY) - step_size * m / (tl.sqrt(v) / root_correction + EPS)
    tl.store(exp_avg_ptr + index, m, mask=mask)
    tl.store(exp_avg_sq_ptr + index, v, mask=mask)
    if HAS_MASTER:
        tl.store(master_ptr + index, value, mask=mask)
    if REMAINDER:
        high, low = split(value)
        tl.store(master_ptr + index, low, mask=mask)
        tl.store(params_ptr + index, high, mask=mask)
    elif STOCHASTIC:
        bits = rounding_bits(tl.load(seed_ptr), step.to(tl.int64), first_index + index)
        tl.store(params_ptr + index, round_stochastic(value, bits), mask=mask)
    else:
        tl.store(params_ptr + index, value.to(params_ptr.dtype.element_ty), mask=mask)


def _update(
    params: Tensor,
    master: Tensor | None,
    state: tuple[Tensor, Tensor, Tensor],
    scalars: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    options: tuple[float, float, float, float],
    *,
    remainder: bool = False,
    stochastic: bool = False,
) -> None:
    """One launch for the multiple of ALIGNED elements, and one for the rest if there is any."""
    config = STEP.pick()
    beta1, beta2, eps, weight_decay = options
    whole = params.numel() // ALIGNED * ALIGNED
    for first, size in ((0, whole), (whole, params.numel() - whole)):
        part = slice(first, first + size)
        value = params[part]
        launch(
            step_kernel,
            (triton.cdiv(size, config.blocks["BLOCK"]),),
            config,
            value, value if master is None else master[part], *(x[part] for x in state), *scalars, size, first,
            BETA1=beta1, BETA2=beta2, LOG_BETA1=_log(beta1), LOG_BETA2=_log(beta2), EPS=eps,
            WEIGHT_DECAY=weight_decay, HAS_MASTER=master is not None and not remainder, REMAINDER=remainder,
            STOCHASTIC=stochastic,
        )  # fmt: skip


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -1e3  # exp(-1e3) is 0, and so is 0^step


def step_(
    params: Tensor, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grads: Tensor, lr: Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float, step: Tensor, clip_coefficient: Tensor, skip: Tensor,
) -> None:  # fmt: skip
    """Backend "triton" of `adamw_`; where master is params itself it is written once."""
    shared = params.dtype == master.dtype and params.data_ptr() == master.data_ptr()
    _update(
        params,
        None if shared else master,
        (exp_avg, exp_avg_sq, grads),
        (lr, step, clip_coefficient, skip, skip),  # no seed: a placeholder
        (beta1, beta2, eps, weight_decay),
    )


def remainder_step_(
    params: Tensor, remainder: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grads: Tensor, lr: Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float, step: Tensor, clip_coefficient: Tensor, skip: Tensor,
) -> None:  # fmt: skip
    """Backend "triton" of `adamw_remainder_`."""
    _update(
        params,
        remainder,
        (exp_avg, exp_avg_sq, grads),
        (lr, step, clip_coefficient, skip, skip),
        (beta1, beta2, eps, weight_decay),
        remainder=True,
    )


def stochastic_step_(
    params: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grads: Tensor, lr: Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float, step: Tensor, clip_coefficient: Tensor, skip: Tensor,
    seed: Tensor,
) -> None:  # fmt: skip
    """Backend "triton" of `adamw_stochastic_`."""
    _update(
        params,
        None,
        (exp_avg, exp_avg_sq, grads),
        (lr, step, clip_coefficient, skip, seed),
        (beta1, beta2, eps, weight_decay),
        stochastic=True,
    )
