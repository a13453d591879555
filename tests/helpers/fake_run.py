"""Run directories made up for tests of the report: plausible numbers, any length, any ailment."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

Kind = Literal["good", "overfitting", "diverging", "short", "no_evals"]

BATCH_TOKENS = 4096
VOCAB = 4096
BYTES_PER_TOKEN = 3.3
PARAMETERS = 5_900_000
PEAK_FLOPS = 0.86e12
TERMS = {
    "attention_qkv": 7.08e6,
    "attention_output": 2.36e6,
    "mlp": 1.947e7,
    "head": 6.29e6,
    "attention_full": 4.72e6,
}
FULL_FLOPS = sum(TERMS.values())
CAUSAL_FLOPS = FULL_FLOPS - 0.5 * TERMS["attention_full"]

CONFIG = """\
name = "NAME"
preset = "tiny"

[model]
family = "llama"
num_layers = 6
hidden_size = 256

[train]
steps = 1200
seq_length = 256
global_batch_size = 16
precision = "auto"

[optimizer]
learning_rate = 0.002
weight_decay = 0.1
"""


def write_fake_run(
    folder: Path, kind: Kind = "good", *, steps: int = 1200, seed: int = 0, sources: int = 2
) -> Path:
    """Write every file of a run directory and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    losses = _losses(kind, steps, rng)
    metrics = [_metric(kind, step, steps, losses, rng) for step in range(1, steps + 1)]
    evals = [] if kind == "no_evals" else _evals(kind, steps, losses, sources)
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "evals.jsonl", evals)
    write_lines(folder / "events.jsonl", _events(metrics))
    write_json(folder / "run.json", _run(folder.name))
    write_json(folder / "baselines.json", BASELINES)
    write_json(folder / "overlap.json", _overlap(kind))
    (folder / "config.toml").write_text(CONFIG.replace("NAME", folder.name), encoding="utf-8")
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """JSON lines; non-finite numbers are null, as the trainer writes them."""
    clean = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        for record in records
    ]
    path.write_text("".join(json.dumps(record, allow_nan=False) + "\n" for record in clean), encoding="utf-8")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """One JSON file."""
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


BASELINES = {
    "gzip_bits_per_byte": 2.41,
    "xz_bits_per_byte": 2.02,
    "unigram_bits_per_byte": 2.95,
    "bigram_bits_per_byte": 2.12,
    "val_bytes": 512_000,
    "val_tokens": 155_000,
    "sources": {
        "stdlib": {"gzip_bits_per_byte": 2.3, "xz_bits_per_byte": 1.95},
        "documentation": {"gzip_bits_per_byte": 2.9, "xz_bits_per_byte": 2.6},
        "tests": {"gzip_bits_per_byte": 1.9, "xz_bits_per_byte": 1.5},
    },
    "seconds": 2.4,
}


def _losses(kind: Kind, steps: int, rng: np.random.Generator) -> np.ndarray:
    """[steps] training losses: a power law from ln V, with noise."""
    step = np.arange(steps)
    start = math.log(VOCAB) + 0.02
    floor = 1.0 if kind == "overfitting" else 2.6
    curve = floor + (start - floor) * (1 + step / 12) ** (-0.5 if kind == "overfitting" else -0.42)
    losses = curve + rng.normal(0, 0.07, steps) * np.minimum(1, step / 30)
    if kind == "diverging":
        turn = int(steps * 0.6)
        losses[turn:] += 4.5 * (1 - np.exp(-np.arange(steps - turn) / (steps * 0.06)))
        losses[int(steps * 0.93) :] = np.nan
    return losses


def _metric(
    kind: Kind, step: int, steps: int, losses: np.ndarray, rng: np.random.Generator
) -> dict[str, Any]:
    loss = float(losses[step - 1])
    forward, backward = rng.normal(82, 2), rng.normal(171, 4)
    optimizer, wait = rng.normal(14, 0.5), abs(rng.normal(0.6, 0.3))
    if rng.random() < 0.01:
        backward += 60
    total = forward + backward + optimizer + wait + 9
    rate = BATCH_TOKENS / total * 1e3
    skipped = not math.isfinite(loss)
    spike = kind == "good" and step in (steps // 3, steps // 2)
    norm = 0.55 + 4 * math.exp(-step / 20) + abs(rng.normal(0, 0.06)) + (6 if spike else 0)
    if kind == "diverging" and step > 0.6 * steps:
        norm *= 1 + 20 * (step / steps - 0.6)
    record = {
        "step": step, "tokens": step * BATCH_TOKENS, "loss": loss + (0.9 if spike else 0),
        "grad_norm": math.nan if skipped else norm, "learning_rate": _rate(step, steps),
        "global_batch_size": 16, "valid_tokens": BATCH_TOKENS - 16, "skipped": int(skipped),
        "spike": int(spike), "step_ms": total, "data_wait_ms": wait, "forward_ms": forward,
        "backward_ms": backward, "communication_ms": 0.0, "optimizer_ms": optimizer, "tokens_per_s": rate,
        "mfu_causal": rate * CAUSAL_FLOPS / PEAK_FLOPS, "mfu_full": rate * FULL_FLOPS / PEAK_FLOPS,
        "peak_memory_bytes": int(1.9e9 + 2e7 * min(step, 40)),
    }  # fmt: skip
    if step % 10 == 0:
        record["update_ratio"] = 1.4e-3 * _rate(step, steps) / 2e-3 + 1e-4
        record["weight_norm"] = 80 + 0.02 * step
    return record


def _rate(step: int, steps: int) -> float:
    warm = min(1.0, step / 100)
    return 2e-3 * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def _evals(kind: Kind, steps: int, losses: np.ndarray, sources: int) -> list[dict[str, Any]]:
    every = max(1, steps // 8)
    names = ["stdlib", "documentation", "tests"][:sources]
    records = []
    for step in sorted({*range(every, steps + 1, every), steps}):
        around = losses[max(0, step - 20) : step]
        loss = float(np.nanmean(around)) + 0.06 if np.isfinite(around).any() else math.nan
        if kind == "overfitting":
            loss = 2.9 + 1.9 * math.exp(-step / (0.12 * steps)) + 1.1 * (step / steps) ** 2
        bits = loss / math.log(2) / BYTES_PER_TOKEN
        records.append(
            {
                "step": step, "tokens": step * BATCH_TOKENS, "val_loss": loss, "val_bits_per_byte": bits,
                "val_tokens": 155_000, "val_bytes": 512_000, "complete": step == steps, "seconds": 3.1,
                "sources": {
                    name: {
                        "loss": loss, "bits_per_byte": bits * (0.85 + 0.25 * i),
                        "tokens": 70_000, "bytes": 230_000,
                    }
                    for i, name in enumerate(names)
                } if math.isfinite(loss) else {},
                "samples": _samples(step / steps),
            }
        )  # fmt: skip
    return [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()}
        for r in records
    ]


def _samples(progress: float) -> list[dict[str, Any]]:
    early = " self.\n  the, in(  def for\n\n'= 'return))  of of the  <b>&amp;</b>\n"
    late = (
        "    def close(self):\n        \"\"\"Close the file and release the lock.\"\"\"\n"
        "        if self._file is not None:\n            self._file.close()\n            self._file = None\n"
        "        return self._lock.release() if a < b & c else None\n"
    )  # fmt: skip
    text = early if progress < 0.3 else late
    return [
        {"prompt": prompt, "text": text, "temperature": 0.8, "tokens": list(range(48)), "new_tokens": 48}
        for prompt in ("", "def main(")
    ]


def _events(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Start, checkpoints, one resume in the middle, spikes, skips and the end."""
    events: list[dict[str, Any]] = [{"step": 0, "kind": "start", "time": 1.76e9}]
    steps = len(metrics)
    seconds = 0.0
    for record in metrics:
        seconds += record["step_ms"] / 1e3
        for key, kind in (("spike", "spike"), ("skipped", "skip")):
            if record[key]:
                details = {"rank": 0, "parameter": "layers.3.mlp.down_proj.weight", "loss": record["loss"]}
                events.append({"step": record["step"], "kind": kind, "time": 1.76e9 + seconds, **details})
        if record["step"] % 500 == 0:
            path = f"checkpoints/step_{record['step']:08d}"
            events.append(
                {"step": record["step"], "kind": "checkpoint", "time": 1.76e9 + seconds, "path": path}
            )
        if steps >= 100 and record["step"] == steps // 2:
            events.append({"step": record["step"], "kind": "resume", "time": 1.76e9 + seconds})
    events.append({"step": steps, "kind": "finish", "time": 1.76e9 + seconds})
    return events


def _run(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "command": "megalite pretrain examples/tiny.toml --train.steps 1200",
        "versions": {"python": "3.11.9", "torch": "2.13.0+cpu", "megalite": "0.1.0", "numpy": "2.4.6"},
        "commit": "f1256c3d2",
        "machine": {
            "cpu": "AMD EPYC 9B14", "cores": 2, "threads": 2, "isa": "AVX-512 (bf16)",
            "memory_bytes": 24 * 2**30, "device": "cpu",
        },
        "precision": {
            "requested": "auto", "chosen": "bf16",
            "reason": "a bf16 matrix product runs at 2.32 times the fp32 rate here (bf16 from 1.2)",
            "gemm_fp32_gflops": 370.0, "gemm_bf16_gflops": PEAK_FLOPS / 1e9,
        },
        "gemm_peak_tflops": PEAK_FLOPS / 1e12,
        "table_peak_tflops": None,
        "peak_source": "measured: best of square matrix products on this device",
        "flops_terms": TERMS,
        "flops_per_token_full": FULL_FLOPS,
        "flops_per_token_causal": CAUSAL_FLOPS,
        "parameters": {"total": PARAMETERS, "matmul": 4_850_000, "embedding": 1_050_000},
        "model": {"family": "llama", "vocab_size": VOCAB, "num_layers": 6, "hidden_size": 256},
        "data": {
            "paths": ["data/stdlib"], "tokenizer_fingerprint": "9f2c" * 16, "train_tokens": 6_400_000,
            "train_bytes": 21_100_000, "documents": 5200, "bytes_per_token": BYTES_PER_TOKEN,
        },
        "setup_s": 41.2,
    }  # fmt: skip


def _overlap(kind: Kind) -> dict[str, Any]:
    return {
        "repetition_rate": 0.14, "natural_repetition_rate": 0.11, "distinct_2": 0.83,
        "longest_shared": 96 if kind == "overfitting" else 17, "natural_longest_shared": 21,
        "sample_tokens": 128, "longest_shared_text": "self._lock = threading.Lock()", "vocab_size": VOCAB,
        "unseen_tokens": 12, "scanned_tokens": 6_400_000, "complete": True,
    }  # fmt: skip
