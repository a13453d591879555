"""AdamW on flat buffers in plain torch. Source: Loshchilov and Hutter, "Decoupled Weight Decay", 2019.

With remainders the fp32 master is the bf16 parameter and 16 bits more (`join`, `split`): its pattern is the
parameter's, shifted up by 16, plus the remainder, a signed number. The parameter is the master rounded to the nearest
bf16; where two are equally near, the one farther from zero, because the remainder of the other would be 2^15, one more
than 16 bits hold. `Tensor.to(bfloat16)` takes the even one of the two: it differs at every other tie, one number in
131,072. Every finite master, and infinity, comes back to the bit. NaN stays NaN, its payload is lost.

Stochastic rounding takes its random bits from `rounding_bits`, which every backend computes alike.
Source of the hash: Wellons, "Prospecting for Hash Functions", 2018 (its lowbias32).
"""

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
    m, v, updated = _updated(
        master, exp_avg, exp_avg_sq, grads, lr, beta1, beta2, eps, weight_decay, step, clip_coefficient
    )
    keep = skip.to(torch.bool)
    new_params = torch.where(keep, params, updated.to(params.dtype))
    master.copy_(torch.where(keep, master, updated))
    exp_avg.copy_(torch.where(keep, exp_avg, m))
    exp_avg_sq.copy_(torch.where(keep, exp_avg_sq, v))
    params.copy_(new_params)


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
    """`step_` with the master that bf16 params and their int16 remainders make."""
    master = join(params, remainder)
    m, v, updated = _updated(
        master, exp_avg, exp_avg_sq, grads, lr, beta1, beta2, eps, weight_decay, step, clip_coefficient
    )
    keep = skip.to(torch.bool)
    high, low = split(updated)
    exp_avg.copy_(torch.where(keep, exp_avg, m))
    exp_avg_sq.copy_(torch.where(keep, exp_avg_sq, v))
    params.copy_(torch.where(keep, params, high))
    remainder.copy_(torch.where(keep, remainder, low))


def join(params: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 masters whose upper parts are bf16 params, and whose lower ones int16 remainders; of any shape."""
    return (params.view(torch.int16).to(torch.int32) << 16).add_(remainder).view(torch.float32)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 masters of any shape as (bf16 params, int16 remainders): what `join` undoes."""
    bits = torch.where(master.isnan(), torch.nan, master).view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = bits.sub_(high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


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
    """`step_` with bf16 params for master, and the result rounded up or down at random (`round_stochastic`)."""
    m, v, updated = _updated(
        params.float(),
        exp_avg,
        exp_avg_sq,
        grads,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        clip_coefficient,
    )
    keep = skip.to(torch.bool)
    rounded = round_stochastic(updated, rounding_bits(seed, step, params.numel()))
    exp_avg.copy_(torch.where(keep, exp_avg, m))
    exp_avg_sq.copy_(torch.where(keep, exp_avg_sq, v))
    params.copy_(torch.where(keep, params, rounded))


def round_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 to bf16: up with the probability of the part that is cut off, so that the expectation is x.

    The 16 random bits are added to the 16 lowest of the float's pattern, which are then cut off. Infinities and
    NaN are rounded as usual.
    """
    pattern = x.view(torch.int32).to(torch.int64) & WORD
    raised = ((pattern + bits) >> 16).to(torch.int32).to(torch.int16).view(torch.bfloat16)
    return torch.where(torch.isfinite(x), raised, x.to(torch.bfloat16))


def rounding_bits(seed: Tensor, step: Tensor, size: int) -> Tensor:
    """16 random bits for each element of a flat buffer: a hash of (seed, step, index), int64 below 65,536.

    With `mix` on 32-bit words, all additions modulo 2^32, and lo and hi being the words of a 64-bit integer:
    key = mix(mix(mix(mix(lo(seed) + GOLDEN) + hi(seed)) + lo(step)) + hi(step)), then for element i
    word = mix(key + hi(i)) and bits = mix(mix(lo(i) ^ word) + word) >> 16.
    """
    index = torch.arange(size, dtype=torch.int64, device=seed.device)
    word = mix((key(seed, step) + (index >> 32)) & WORD)
    return mix((mix((index & WORD) ^ word) + word) & WORD) >> 16


def key(seed: Tensor, step: Tensor) -> Tensor:
    """The part of `rounding_bits` that all elements share: a 32-bit word in int64."""
    seed, step = seed.to(torch.int64), step.to(torch.int64)
    hashed = mix((seed + GOLDEN) & WORD)
    for word in (seed >> 32, step, step >> 32):
        hashed = mix((hashed + (word & WORD)) & WORD)
    return hashed


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words (in int64) that spreads every bit over all."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & WORD
    return x ^ (x >> 16)


WORD = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: a seed of 0 doesn't start from 0, which mix keeps


def _updated(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """New (exp_avg, exp_avg_sq, parameters), all wide."""
    wide = master.dtype
    lr, step = lr.to(torch.float64), step.to(torch.float64)
    step_size = (lr / (1 - beta1**step)).to(wide)
    root_correction = (1 - beta2**step).sqrt().to(wide)
    g = grads.to(wide) * clip_coefficient.to(wide)
    m = exp_avg * beta1 + g * (1 - beta1)
    v = exp_avg_sq * beta2 + g.square() * (1 - beta2)
    decayed = master * (1 - lr * weight_decay).to(wide)
    return m, v, decayed - step_size * m / (v.sqrt() / root_correction + eps)
