"""AdamW and the gradient norm over flat buffers of 100M elements."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels.triton import adamw, grad_norm
from tests.triton_gate.gate import Case

SIZE = 100_000_000


def _flat(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(SIZE, dtype=dtype, device="meta")


def _scalars() -> tuple[Tensor | float, ...]:
    value, skip = torch.empty((), device="meta"), torch.empty((), dtype=torch.bool, device="meta")
    return (value, 0.9, 0.95, 1e-8, 0.1, value, value, skip)


def _step(dtype: torch.dtype) -> None:
    adamw.step_(_flat(dtype), _flat(), _flat(), _flat(), _flat(), *_scalars())  # type: ignore[arg-type]


def _remainder_step() -> None:
    state = _flat(torch.int16), _flat(), _flat(), _flat()
    adamw.remainder_step_(_flat(torch.bfloat16), *state, *_scalars())  # type: ignore[arg-type]


def _stochastic_step() -> None:
    seed = torch.empty((), dtype=torch.int64, device="meta")
    state = _flat(), _flat(), _flat()
    adamw.stochastic_step_(_flat(torch.bfloat16), *state, *_scalars(), seed)  # type: ignore[arg-type]


CASES = [
    Case("adamw_ 100M bf16 with master", lambda: _step(torch.bfloat16)),
    Case("adamw_ 100M fp32 its own master", lambda: _step(torch.float32)),
    Case("adamw_remainder_ 100M bf16", _remainder_step),
    Case("adamw_stochastic_ 100M bf16", _stochastic_step),
    Case("grad_norm 100M fp32", lambda: grad_norm.norm([_flat()])),
    Case("grad_norm 100M bf16", lambda: grad_norm.norm([_flat(torch.bfloat16)])),
]
