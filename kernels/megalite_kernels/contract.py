"""What each op promises: tested dtypes, tolerance, and the least it must move and compute.

Tests, doctor and benchmarks read the same entries. Bytes are those of memory-bound ops at the floor: each input
read once, each output written once; FLOPs are those of the products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Bytes = Callable[..., int]

ALL_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Contract:
    """One public op."""

    name: str
    reference: str
    """Module of the plain torch definition."""
    factor: float = 2.0
    """Accepted multiple of plain torch's own error against float64 (`testing.assert_as_accurate`)."""
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    forward_bytes: Bytes | None = None
    """Of (rows, cols, itemsize) for row-wise ops."""
    backward_bytes: Bytes | None = None
    flops: Callable[..., int] | None = None
    """Forward FLOPs of the products: (tokens, hidden, vocabulary) or (batch, rows, keys, heads, dim, causal)."""


def _row_wise(reads_and_writes: int) -> Bytes:
    return lambda rows, cols, itemsize: reads_and_writes * rows * cols * itemsize


def _attention_flops(batch: int, rows: int, keys: int, heads: int, dim: int, causal: bool) -> int:
    return 4 * batch * rows * keys * heads * dim // (2 if causal else 1)


_REFERENCE = "megalite_kernels.reference."

CONTRACTS: dict[str, Contract] = {
    contract.name: contract
    for contract in (
        Contract(
            "rms_norm",
            _REFERENCE + "rms_norm",
            forward_bytes=_row_wise(2),  # x in, y out
            backward_bytes=_row_wise(3),  # dy, x in, dx out
        ),
        Contract(
            "layer_norm", _REFERENCE + "layer_norm", forward_bytes=_row_wise(2), backward_bytes=_row_wise(3)
        ),
        Contract(
            "swiglu",
            _REFERENCE + "activation",
            forward_bytes=_row_wise(3),  # of [rows, F]: gate, up in, y out
            backward_bytes=_row_wise(5),  # dy, gate, up in, dgate, dup out
        ),
        Contract("geglu", _REFERENCE + "activation", forward_bytes=_row_wise(3), backward_bytes=_row_wise(5)),
        Contract("gelu", _REFERENCE + "activation", forward_bytes=_row_wise(2), backward_bytes=_row_wise(3)),
        Contract(
            "relu_squared", _REFERENCE + "activation", forward_bytes=_row_wise(2), backward_bytes=_row_wise(3)
        ),
        Contract("rope", _REFERENCE + "rope", forward_bytes=_row_wise(2), backward_bytes=_row_wise(2)),
        Contract("rope_", _REFERENCE + "rope", forward_bytes=_row_wise(2), backward_bytes=_row_wise(2)),
        Contract(
            "embedding",
            _REFERENCE + "embedding",
            forward_bytes=_row_wise(2),  # of [tokens, H]: the tokens' rows in, y out
            backward_bytes=_row_wise(1),  # dy in; dweight, [V, H], comes on top
        ),
        Contract(
            "cross_entropy",
            _REFERENCE + "cross_entropy",
            forward_bytes=_row_wise(1),
            backward_bytes=_row_wise(2),
        ),
        Contract(
            "linear_cross_entropy",
            _REFERENCE + "linear_cross_entropy",
            flops=lambda tokens, hidden, vocabulary: 2 * tokens * hidden * vocabulary,
        ),
        Contract("attention", _REFERENCE + "attention", flops=_attention_flops),
        Contract(
            "adamw_",
            _REFERENCE + "adamw",
            # master, two moments and the gradient in; master, two moments and the parameter out
            forward_bytes=lambda size, _, itemsize: size * (28 + itemsize),
        ),
        Contract("grad_norm", _REFERENCE + "grad_norm", forward_bytes=_row_wise(1)),
        Contract("linear", "torch.nn.functional.linear"),
    )
}
