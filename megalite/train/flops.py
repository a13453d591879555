"""FLOPs of a training step, term by term, and the peak that model FLOPs utilisation is measured against.

Forward and backward of a matrix product cost 2 + 4 FLOPs per weight and token; attention scores and values
cost 2 · S · N · D each per token and layer in the forward if every query sees all S keys ("full"
convention, PaLM appendix B), and half of that if it sees those before it ("causal" convention, Megatron
since 2025). MFU by the full convention is the larger number; published figures use either, so both are
printed. Not counted: embedding look-ups, norms, activations, the optimizer, padding rows of the vocabulary.
Document boundaries shorten attention further; neither convention credits that. What a layer's backward pass makes
again (`recompute`) is no use to the model: hardware FLOPs utilisation, HFU, counts it too, MFU does not.

With more than one type of product a run is held to the time that its own products would take at their peaks,

    MFU = (FLOPs_fp8 / peak_fp8 + FLOPs_bf16 / peak_bf16) / measured time,

so that moving a product to FP8 raises the bar along with the rate. FP8 are the products of the blocks' projections,
all of them with tensorwise scaling and two of three (forward and dgrad) with rowwise; attention, head and the other
weight gradients are bf16. The same rate against the bf16 peak alone ("bf16-equivalent", what speed-ups over bf16 are
read from, and what may exceed 100 %) has a name of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite.errors import UserError
from megalite.layers.recompute import Recompute
from megalite_kernels.ops import fp8
from megalite_kernels.ops.fp8_linear import Scaling
from megalite_kernels.products import Product, fast_products, square_products
from megalite_kernels.scaled_mm import lacks_fp8

DENSE_BF16_PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "B200": 2250.0,
    "GB200": 2500.0,
    "L40S": 362.05,
    "MI300X": 1307.4,
}
"""Vendors' dense bf16 figures by device name; the longest matching name counts."""
DENSE_FP8_PEAK_TFLOPS = {
    "H100 PCIe": 1513.0,
    "H100 NVL": 1670.5,
    "H100": 1978.9,
    "H200": 1978.9,
    "B200": 4500.0,
    "GB200": 5000.0,
    "L40S": 733.0,
    "MI300X": 2614.9,
}
"""As above, of dense FP8 products with fp32 sums."""
FP8_TERMS = ("attention_qkv", "attention_output", "mlp")
"""Terms of products that `train.precision = "fp8"` moves to FP8."""
FP8_SHARE: dict[Scaling | None, float] = {None: 0.0, "rowwise": 2 / 3, "tensorwise": 1.0}
"""How much of those terms: rowwise scaling leaves the weight gradient in bf16."""


@dataclass(frozen=True, slots=True)
class Peak:
    """FLOP/s that utilisation is measured against."""

    main: float
    """Of the compute type."""
    fp8: float
    """Of FP8 products; the main one where none are made, or where they are emulated."""


@dataclass(frozen=True, slots=True)
class FlopsPerToken:
    """Training FLOPs (forward + backward) per token, by term."""

    terms: dict[str, float]
    """Matrix products by name, and ``attention_full``."""
    fp8_share: float = 0.0
    """Part of `FP8_TERMS` that is multiplied in FP8."""
    again: dict[str, float] = field(default_factory=dict)
    """By term, what is multiplied a second time, all of it forward."""

    @property
    def full(self) -> float:
        """Every query counted against all keys of the sequence."""
        return sum(self.terms.values())

    @property
    def causal(self) -> float:
        """Attention counted at half."""
        return self.full - 0.5 * self.terms["attention_full"]

    @property
    def fp8(self) -> float:
        """Multiplied in FP8, by either convention."""
        return self.fp8_share * sum(self.terms[name] for name in FP8_TERMS)

    def mixed_peak(self, total: float, peak: Peak) -> float:
        """FLOP/s at which the `total` (`full` or `causal`) would run with each product at its own type's peak."""
        return total / self.ideal_seconds(total, peak)

    def ideal_seconds(self, total: float, peak: Peak) -> float:
        """Seconds that a token's `total` would take with each product at its own type's peak."""
        return self.fp8 / peak.fp8 + (total - self.fp8) / peak.main

    def ideal_seconds_again(self, peak: Peak, *, causal: bool) -> float:
        """The same of what is multiplied again."""
        fp8 = sum(self.again.get(name, 0.0) for name in FP8_TERMS) if self.fp8_share else 0.0
        total = sum(self.again.values()) - 0.5 * causal * self.again.get("attention_full", 0.0)
        return fp8 / peak.fp8 + (total - fp8) / peak.main


def flops_per_token(model: ModelConfig, seq_length: int, fp8: Scaling | None = None) -> FlopsPerToken:
    """Training FLOPs per token at sequence length `seq_length` (S), with FP8 products of scaling `fp8`, if any.

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
    return FlopsPerToken(terms, FP8_SHARE[fp8])


def flops_made_again(
    model: ModelConfig, seq_length: int, choices: Mapping[int, Recompute]
) -> dict[str, float]:
    """FLOPs per token, by term, of what the backward passes of layers make again; empty if no product is.

    Args:
        model: its shape.
        seq_length: S.
        choices: what each layer makes again.
    """
    hidden, head = model.hidden_size, model.size_per_head
    queries, keys = model.num_attention_heads * head, model.kv_heads * head
    terms: dict[str, float] = {}
    for layer, choice in choices.items():
        seen = min(seq_length, model.window_of_layer(layer) or seq_length)
        of_layer = {
            "attention_qkv": choice.full * 2.0 * hidden * (queries + 2 * keys),
            "attention_output": choice.full * 2.0 * queries * hidden,
            "mlp": (choice.full or choice.mlp) * 2.0 * hidden * model.ffn_hidden_size * (1 + model.gated),
            "attention_full": choice.full * 4.0 * seen * queries,
        }
        terms = {name: terms.get(name, 0.0) + flops for name, flops in of_layer.items()}
    return terms if any(terms.values()) else {}


def table_peak_tflops(device: torch.device, *, fp8: bool = False) -> float | None:
    """Dense bf16 (or FP8) peak of a known GPU; None for anything else (never a guess)."""
    if device.type != "cuda":
        return None
    table = DENSE_FP8_PEAK_TFLOPS if fp8 else DENSE_BF16_PEAK_TFLOPS
    name = torch.cuda.get_device_name(device)
    matches = [known for known in table if known in name]
    return table[max(matches, key=len)] if matches else None


def peak_flops(precision: Precision, device: torch.device) -> Peak:
    """What one device's utilisation is measured against: the vendor's figures, else measured products."""
    main = table_peak_tflops(device) or precision.gemm_peak_tflops
    fp8 = main
    if precision.gemm_fp8_tflops:
        fp8 = table_peak_tflops(device, fp8=True) or precision.gemm_fp8_tflops
    return Peak(main * 1e12, fp8 * 1e12)


def measure_gemm_tflops(device: torch.device, dtype: torch.dtype, *, budget_s: float = 0.5) -> float:
    """Best rate of square matrix products (1024³, 2048³, 4096³ as time allows) on this device, in TFLOP/s.

    On CPUs torch's or this library's, whichever is faster. With an FP8 dtype the product is that of the layers, with
    one scale for each operand and a bf16 result.

    Inputs are random normal: zeros and constants draw less power and flatter the figure. Products follow each
    other until `budget_s` is used; the best one counts, since a shared machine only ever slows one down.
    """
    best = 0.0
    deadline = time.perf_counter() + budget_s
    makers: dict[str, Product] = {"fp8": _by_fp8} if dtype == fp8.E4M3 else fast_products(dtype, device)
    for size in (1024, 2048, 4096):
        if best and 2 * size**3 / (best * 1e12) > deadline - time.perf_counter():
            break
        products = square_products(size, dtype, device, makers).values()
        for multiply in products:
            _timed(multiply, device)
        for _ in range(20):
            best = max(best, 2 * size**3 / min(_timed(multiply, device) for multiply in products) / 1e12)
            if time.perf_counter() > deadline:
                break
    return best


def _by_fp8(left: Tensor, right: Tensor) -> Callable[[], object]:
    one = torch.ones((), device=left.device)
    return partial(fp8.product, left, one, right, one, None, torch.bfloat16)


def _timed(multiply: Callable[[], object], device: torch.device) -> float:
    """Seconds of one product."""
    _synchronize(device)
    start = time.perf_counter()
    multiply()
    _synchronize(device)
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
    gemm_fp8_tflops: float = 0.0
    """0 where the run makes no FP8 products, or emulates them."""

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype; that of everything but the blocks' products with FP8."""
        return torch.float32 if self.chosen == "fp32" else torch.bfloat16

    @property
    def gemm_peak_tflops(self) -> float:
        """Measured matrix-product peak in the compute type."""
        return self.gemm_fp32_tflops if self.chosen == "fp32" else self.gemm_bf16_tflops


BF16_WORTHWHILE = 1.2
"""bf16 is chosen where its matrix product is at least this much faster than fp32's (else it is emulated)."""


def choose_precision(requested: str, device: torch.device) -> Precision:
    """Measure fp32 and bf16 matrix products and settle the compute type.

    Raises:
        UserError: FP8 is asked for on a GPU that has no FP8 products.
    """
    lack = lacks_fp8(device)
    if requested == "fp8" and lack is not None and device.type != "cpu":
        raise UserError(f"train.precision='fp8' does not run here: {lack}. Take train.precision='bf16'")
    fp32 = measure_gemm_tflops(device, torch.float32)
    bf16 = measure_gemm_tflops(device, torch.bfloat16)
    if requested == "fp8":
        if lack is not None:
            reason = "as configured; emulated on this CPU, slower than bf16, to try its numerics"
            return Precision(requested, "fp8", reason, fp32, bf16)
        return Precision(requested, "fp8", "as configured", fp32, bf16, measure_gemm_tflops(device, fp8.E4M3))
    if requested != "auto":
        return Precision(requested, requested, "as configured", fp32, bf16)
    ratio = bf16 / fp32
    chosen = "bf16" if ratio >= BF16_WORTHWHILE else "fp32"
    reason = (
        f"a bf16 matrix product runs at {ratio:.2f} times the fp32 rate here (bf16 from {BF16_WORTHWHILE})"
    )
    return Precision(requested, chosen, reason, fp32, bf16)
