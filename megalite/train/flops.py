"""FLOPs of a training step, term by term, and the peak that model FLOPs utilisation is measured against.

Forward and backward of a matrix product cost 2 + 4 FLOPs per weight and token; attention scores and values
cost 2 · S · N · D each per token and layer in the forward if every query sees all S keys ("full"
convention, PaLM appendix B), and half of that if it sees those before it ("causal" convention, Megatron
since 2025). MFU by the full convention is the larger number; published figures use either, so both are
printed. Not counted: embedding look-ups, norms, activations, the optimizer, padding rows of the vocabulary,
recomputation. Document boundaries shorten attention further; neither convention credits that.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.config import ModelConfig

DENSE_BF16_PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "B200": 2250.0,
    "GB200": 2500.0,
}
"""Vendors' dense bf16 figures by device name; the longest matching name counts."""


@dataclass(frozen=True, slots=True)
class FlopsPerToken:
    """Training FLOPs (forward + backward) per token, by term."""

    terms: dict[str, float]
    """Matrix products by name, and ``attention_full``."""

    @property
    def full(self) -> float:
        """Every query counted against all keys of the sequence."""
        return sum(self.terms.values())

    @property
    def causal(self) -> float:
        """Attention counted at half."""
        return self.full - 0.5 * self.terms["attention_full"]


def flops_per_token(model: ModelConfig, seq_length: int) -> FlopsPerToken:
    """Training FLOPs per token at sequence length `seq_length` (S).

    A sliding window W < S limits the keys of a layer to W in the full convention (its causal half then
    undercounts slightly: a window has fewer masked keys than a triangle).
    """
    hidden, ffn, head = model.hidden_size, model.ffn_hidden_size, model.size_per_head
    queries, keys = model.num_attention_heads * head, model.kv_heads * head
    layers = model.num_layers
    keys_seen = sum(min(seq_length, model.window_of_layer(i) or seq_length) for i in range(layers))
    terms = {
        "attention_qkv": 6.0 * layers * hidden * (queries + 2 * keys),
        "attention_output": 6.0 * layers * queries * hidden,
        "mlp": 6.0 * layers * hidden * ffn * (3 if model.gated else 2),
        "head": 6.0 * hidden * model.vocab_size,
        "attention_full": 12.0 * keys_seen * queries,
    }
    return FlopsPerToken(terms)


def table_peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU; None for anything else (never a guess)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    matches = [known for known in DENSE_BF16_PEAK_TFLOPS if known in name]
    return DENSE_BF16_PEAK_TFLOPS[max(matches, key=len)] if matches else None


def measure_gemm_tflops(device: torch.device, dtype: torch.dtype, *, budget_s: float = 0.5) -> float:
    """Best rate of square matrix products (1024³, 2048³, 4096³ as time allows) on this device, in TFLOP/s.

    Inputs are random normal: zeros and constants draw less power and flatter the figure. Products follow each
    other until `budget_s` is used; the best one counts, since a shared machine only ever slows one down.
    """
    generator = torch.Generator(device=device).manual_seed(0)
    best = 0.0
    deadline = time.perf_counter() + budget_s
    for size in (1024, 2048, 4096):
        if best and 2 * size**3 / (best * 1e12) > deadline - time.perf_counter():
            break
        a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, dtype=dtype, device=device)
        _timed_gemm(a, b, out)
        for _ in range(20):
            best = max(best, 2 * size**3 / _timed_gemm(a, b, out) / 1e12)
            if time.perf_counter() > deadline:
                break
    return best


def _timed_gemm(a: Tensor, b: Tensor, out: Tensor) -> float:
    """Seconds of one product."""
    _synchronize(a.device)
    start = time.perf_counter()
    torch.mm(a, b, out=out)
    _synchronize(a.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class Precision:
    """The compute type of a run and the measurement that chose it."""

    requested: str
    chosen: str
    reason: str
    gemm_fp32_tflops: float
    gemm_bf16_tflops: float

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return torch.bfloat16 if self.chosen == "bf16" else torch.float32

    @property
    def gemm_peak_tflops(self) -> float:
        """Measured matrix-product peak in the chosen type."""
        return self.gemm_bf16_tflops if self.chosen == "bf16" else self.gemm_fp32_tflops


BF16_WORTHWHILE = 1.2
"""bf16 is chosen where its matrix product is at least this much faster than fp32's (else it is emulated)."""


def choose_precision(requested: str, device: torch.device) -> Precision:
    """Measure fp32 and bf16 matrix products and settle the compute type."""
    fp32 = measure_gemm_tflops(device, torch.float32)
    bf16 = measure_gemm_tflops(device, torch.bfloat16)
    if requested != "auto":
        return Precision(requested, requested, "as configured", fp32, bf16)
    ratio = bf16 / fp32
    chosen = "bf16" if ratio >= BF16_WORTHWHILE else "fp32"
    reason = (
        f"a bf16 matrix product runs at {ratio:.2f} times the fp32 rate here (bf16 from {BF16_WORTHWHILE})"
    )
    return Precision(requested, chosen, reason, fp32, bf16)
