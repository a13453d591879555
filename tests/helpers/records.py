"""Made-up benchmark records, in the form in which the benchmarks write them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MACHINE = {"cpu": "AMD EPYC (2 cores)", "cores": 2, "isa": "avx512_bf16", "memory_bytes": 25_276_502_016}
RATES = {
    "megalite": 1208.0,
    "plain-llama-compile-bf16w": 1071.0,
    "plain-llama-compile-autocast": 1034.0,
    "hf-llama-compile": 990.0,
    "litgpt": 930.0,
    "hf-llama": 870.0,
}
FLOPS_PER_TOKEN = 265e6


def throughput_record(
    rates: Mapping[str, float] = RATES, *, peak: float = 0.438, spread: float = 0.02, **fields: Any
) -> dict[str, Any]:
    """A comparison of trainers with the given tokens per second."""
    tokens = 2048
    return {
        "benchmark": "throughput", "time": "2026-11-24T18:00:00Z", "preset": "llama-60m", "seq_length": 512,
        "micro_batch_size": 4, "tokens_per_step": tokens, "precision": "bf16", "layout": "", "threads": 2,
        "clock": "wall", "rounds": 3, "steps_per_round": 4, "device": "cpu", "machine": MACHINE,
        "versions": {"torch": "2.13.0+cpu", "transformers": "5.23.0", "litgpt": "0.5.13", "megatron-core": "0.16.1"},
        "commit": "0123456789ab",
        "command": "python benchmarks/train_throughput.py --preset llama-60m --precision bf16",
        "flops_per_token_causal": FLOPS_PER_TOKEN, "flops_per_token_full": 1.05 * FLOPS_PER_TOKEN,
        "flops_terms": {}, "gemm_peak_tflops": peak, "gemm_shapes": {"2048x2048x2048": peak},
        "table_peak_tflops": None, "peak_source": "measured matrix product",
        "contenders": [contender(name, rate, tokens, peak, spread) for name, rate in rates.items()],
        "skipped": [{"name": "torchtitan", "reason": "not installed"}],
    } | fields  # fmt: skip


def contender(name: str, rate: float, tokens: int, peak: float, spread: float) -> dict[str, Any]:
    """One trainer of a comparison."""
    share = rate * FLOPS_PER_TOKEN / (peak * 1e12)
    step = 1e3 * tokens / rate
    ours = name.startswith("megalite")
    return {
        "name": name, "kind": "ours" if ours else "peer", "tokens_per_s": rate,
        "description": "this trainer" if ours else "another",
        "mfu_causal": share, "mfu_full": 1.05 * share, "gemm_fraction": share, "step_ms_p10": step * (1 - spread),
        "step_ms_p50": step, "step_ms_p90": step * (1 + spread), "measured_steps": 12, "warmup_steps": 2,
        "first_step_s": 2.0, "peak_memory_bytes": 2_080_000_000 if ours else 2_900_000_000,
        "state_bytes": 930_000_000, "memory_above_state_bytes": 1_150_000_000 if ours else 1_970_000_000,
        "allocator": "glibc, freed pages kept", "losses": [10.4, 10.3], "power_watts": None, "clock_mhz": None,
    }  # fmt: skip


def kernel_records(
    times: Mapping[str, float],
    *,
    case: str = "swiglu",
    dtype: str = "bf16",
    spread: float = 0.03,
    **fields: Any,
) -> list[dict[str, Any]]:
    """One case with the given milliseconds of each variant; "copy" is a variant too."""
    return [
        {
            "case": case, "variant": variant, "pass": "forward+backward", "dtype": dtype,
            "shape": {"T": 4096, "F": 2816}, "median_ms": time, "best_ms": 0.97 * time, "spread": spread,
            "rounds": 20, "clock": "wall clock", "bytes": 1 << 27, "flops": 1 << 26,
            "gb_per_s": (1 << 27) / time / 1e6, "gflop_per_s": (1 << 26) / time / 1e6,
            "of_copy": times["copy"] / time, "of_gemm": 0.1 * times["copy"] / time, "op": case.split()[0],
            "benchmark": "kernels", "device": "AMD EPYC (2 cores)", "device_type": "cpu", "driver": None,
            "isa": "avx512_bf16", "threads": 2, "versions": {"torch": "2.13.0+cpu"}, "commit": "0123456789ab",
            "command": "python -m benchmarks.kernels.bench_swiglu --device cpu", "time": "2026-11-24T12:00:00Z",
        } | fields
        for variant, time in times.items()
    ]  # fmt: skip


def write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
