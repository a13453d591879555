"""Training throughput of one preset on this machine, end to end: data, forward, backward, optimizer.

    python benchmarks/train_throughput.py --preset tiny --output benchmarks/results/train_throughput.jsonl

Runs the trainer itself on a made-up dataset of random tokens (speed does not depend on what they say; the
loss is printed so that a broken step shows), skips the warm-up steps, and reports the median step with its
spread. One JSON record per call, with everything needed to repeat it.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from megalite.config import DataConfig, DatasetSpec, EvalConfig, RunConfig, TrainConfig
from megalite.data.dataset import DOCUMENT_RECORD
from megalite.data.indexed import IndexedWriter
from megalite.data.tokenize import Tokenizer
from megalite.models.presets import preset
from megalite.parallel.mesh import close_mesh, make_mesh
from megalite.train.run import run_facts
from megalite.train.setup import Session, build_session, prepare_process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure training throughput of a preset."""

    preset: str = "tiny"
    """Model preset."""
    vocab_size: int = 4096
    """Vocabulary of presets that take it from the data."""
    seq_length: int = 256
    """Tokens per sample."""
    micro_batch_size: int = 16
    """Samples per forward and backward pass."""
    global_batch_size: int = 0
    """Samples per step; 0 is one micro-batch per process."""
    precision: str = "auto"
    """auto, bf16 or fp32."""
    threads: int = 0
    """CPU threads; 0 is all cores."""
    warmup: int = 5
    """Steps before the measured ones."""
    steps: int = 50
    """Measured steps."""
    document_tokens: int = 1000
    """Mean length of the made-up documents (attention ends at their boundaries)."""
    output: str = ""
    """JSONL file to append the record to."""


def main() -> None:
    """Measure, print the record, and append it to the output."""
    arguments = tyro.cli(Arguments)
    with tempfile.TemporaryDirectory() as folder:
        record = measure(arguments, Path(folder))
    line = json.dumps(record)
    if record and arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        with open(arguments.output, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


def measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Train for the given steps and summarise them."""
    total = arguments.warmup + arguments.steps
    with open_session(arguments, folder, total) as session:
        trainer = session.trainer
        for step in range(total):
            result, _ = trainer.train_step(step, session.stop)
            trainer.metrics.add(result)
        records = trainer.metrics.flush()[arguments.warmup :]
        facts = run_facts(session, shlex.join(["python", *sys.argv]), 0.0)
    return summarise(records, facts, session.trainer.config) | {"warmup": arguments.warmup}


@contextmanager
def open_session(arguments: Arguments, folder: Path, steps: int) -> Iterator[Session]:
    """A trainer of the preset on random tokens, ready for `steps` steps; closed at the end of the block."""
    model = preset(arguments.preset)
    vocab_size = model.vocab_size or arguments.vocab_size
    model = dataclasses.replace(model, vocab_size=vocab_size)
    dataset = make_random_dataset(folder / "data", vocab_size, arguments, steps)
    config = RunConfig(
        name=arguments.preset,
        run_dir=str(folder / "run"),
        preset=arguments.preset,
        model=model,
        data=DataConfig(datasets=(DatasetSpec(path=str(dataset)),)),
        train=TrainConfig(
            steps=steps,
            seq_length=arguments.seq_length,
            micro_batch_size=arguments.micro_batch_size,
            global_batch_size=arguments.global_batch_size or arguments.micro_batch_size,
            precision=arguments.precision,  # type: ignore[arg-type]
            threads=arguments.threads,
            log_interval=steps + 1,
        ),
        eval=EvalConfig(interval=0),
    )
    mesh = make_mesh(config.parallel, config.train.device)
    prepare_process(config, mesh)
    session = build_session(config, mesh)
    try:
        yield session
    finally:
        session.trainer.loader.close()
        session.trainer.tensorboard.close()
        session.trainer.progress.close()
        close_mesh(mesh)


def summarise(records: list[dict[str, Any]], facts: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """The benchmark record: medians and spread of the measured steps, and what they were measured on."""
    times = sorted(record["step_ms"] for record in records)
    p50 = statistics.median(times)
    tokens = config.train.global_batch_size * config.train.seq_length
    rate = tokens / (p50 / 1e3)
    peak = (facts["table_peak_tflops"] or facts["gemm_peak_tflops"]) * 1e12 * facts["machine"]["processes"]
    phases = [key for key in records[0] if key.endswith("_ms") and key != "step_ms"]
    return {
        "benchmark": "train_throughput",
        "name": config.name,
        "tokens_per_s": rate,
        "mfu_causal": rate * facts["flops_per_token_causal"] / peak,
        "mfu_full": rate * facts["flops_per_token_full"] / peak,
        "step_ms_p10": times[len(times) // 10],
        "step_ms_p50": p50,
        "step_ms_p90": times[len(times) * 9 // 10],
        "measured_steps": len(times),
        "phases_ms_p50": {key: statistics.median(record[key] for record in records) for key in phases},
        "tokens_per_step": tokens,
        "seq_length": config.train.seq_length,
        "peak_memory_bytes": records[-1]["peak_memory_bytes"],
        "first_loss": records[0]["loss"],
        "last_loss": records[-1]["loss"],
        **{key: facts[key] for key in ("gemm_peak_tflops", "table_peak_tflops", "peak_source", "precision")},
        **{
            key: facts[key]
            for key in ("flops_terms", "parameters", "machine", "versions", "commit", "command")
        },
    }


def make_random_dataset(folder: Path, vocab_size: int, arguments: Arguments, steps: int) -> Path:
    """A prepared dataset of uniformly random tokens, with a tokenizer of bytes only."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    tokenizer = Tokenizer.train(["made up"], vocab_size=257)
    splits = {}
    samples = steps * max(arguments.global_batch_size, arguments.micro_batch_size)
    for name, tokens in (("train", samples * arguments.seq_length), ("validation", 2000)):
        lengths = generator.geometric(
            1 / arguments.document_tokens, size=2 + tokens // arguments.document_tokens
        )
        with IndexedWriter(folder / name, np.int32) as writer:
            for length in lengths:
                body = generator.integers(1, min(vocab_size, 257), size=int(length))
                writer.add_document(np.append(body, tokenizer.eod_id))
            total = {"documents": writer.documents, "tokens": writer.tokens, "bytes": writer.tokens}
        np.save(folder / f"{name}.documents.npy", np.zeros(total["documents"], DOCUMENT_RECORD))
        splits[name] = {**total, "sources": {"random": total}}
    tokenizer.save(folder / "tokenizer.json")
    (folder / "files.jsonl").write_text("{}\n")
    info = {
        "format": "megalite-dataset",
        "version": 1,
        "sources": ["random"],
        "eod_id": tokenizer.eod_id,
        "eod_token": tokenizer.eod_token,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "splits": splits,
    }
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


if __name__ == "__main__":
    main()
