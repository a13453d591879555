"""What each public op promises, and the cases that hold it to that.

Tests, doctor and benchmarks read the same entries; shapes, inputs, plain torch and floors are in `cases`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalite_kernels.cases import cases_of
from megalite_kernels.cases.base import Case

ALL_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Contract:
    """One public op."""

    name: str
    reference: str
    """Module (or function) of the plain torch definition."""
    factor: float = 2.0
    """Accepted multiple of plain torch's own error against float64 (`testing.assert_as_accurate`)."""
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES

    @property
    def cases(self) -> list[Case]:
        """Ways to call it, with plain torch, inputs, shapes, and the floor of bytes and FLOPs."""
        return cases_of(self.name)


_REFERENCE = "megalite_kernels.reference."

CONTRACTS: dict[str, Contract] = {
    contract.name: contract
    for contract in (
        Contract("rms_norm", _REFERENCE + "rms_norm"),
        Contract("layer_norm", _REFERENCE + "layer_norm"),
        Contract("swiglu", _REFERENCE + "activation"),
        Contract("geglu", _REFERENCE + "activation"),
        Contract("gelu", _REFERENCE + "activation"),
        Contract("relu_squared", _REFERENCE + "activation"),
        Contract("rope", _REFERENCE + "rope"),
        Contract("rope_", _REFERENCE + "rope"),
        Contract("embedding", _REFERENCE + "embedding"),
        Contract("cross_entropy", _REFERENCE + "cross_entropy"),
        Contract("linear_cross_entropy", _REFERENCE + "linear_cross_entropy"),
        Contract("attention", _REFERENCE + "attention"),
        Contract("packed_attention", _REFERENCE + "packed_attention"),
        Contract("adamw_", _REFERENCE + "adamw"),
        Contract("grad_norm", _REFERENCE + "grad_norm"),
        Contract("linear", "torch.nn.functional.linear"),
        Contract("fp8_linear", _REFERENCE + "fp8"),
        Contract("fp8_rms_norm", _REFERENCE + "fp8_fused"),
        Contract("fp8_layer_norm", _REFERENCE + "fp8_fused"),
        Contract("fp8_activation", _REFERENCE + "fp8_fused"),
    )
}
