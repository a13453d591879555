"""A prepared dataset and a run small enough to train in a second, for tests of the trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from megalite.config import DataConfig, DatasetSpec, RunConfig
from megalite.config_values import from_dict
from megalite.data.dataset import DOCUMENT_RECORD
from megalite.data.indexed import IndexedWriter
from megalite.data.tokenize import Tokenizer

WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "sees",
    "likes",
    "big",
    "red",
    "house",
    "and",
    "or",
    "runs",
    "sleeps",
    "under",
)


def make_dataset(folder: Path, *, documents: int = 120, seed: int = 0, vocab_size: int = 300) -> Path:
    """Write a prepared dataset of short made-up documents, every tenth of them held out, two sources."""
    folder.mkdir(parents=True, exist_ok=True)
    chooser = random.Random(seed)
    texts = [" ".join(chooser.choices(WORDS, k=chooser.randint(5, 60))) + "." for _ in range(documents)]
    tokenizer = Tokenizer.train(texts, vocab_size=vocab_size)
    splits = {
        "train": _write_split(folder, "train", [t for i, t in enumerate(texts) if i % 10], tokenizer),
        "validation": _write_split(folder, "validation", texts[::10], tokenizer),
    }
    tokenizer.save(folder / "tokenizer.json")
    (folder / "files.jsonl").write_text(
        json.dumps({"path": "made up", "source": "even", "unit": "byte"}) + "\n"
    )
    info = {
        "format": "megalite-dataset",
        "version": 1,
        "sources": ["even", "odd"],
        "eod_id": tokenizer.eod_id,
        "eod_token": tokenizer.eod_token,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "splits": splits,
    }
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


def _write_split(folder: Path, name: str, texts: list[str], tokenizer: Tokenizer) -> dict[str, Any]:
    records = np.zeros(len(texts), DOCUMENT_RECORD)
    tokens = np.zeros(len(texts), np.int64)
    with IndexedWriter(folder / name, np.uint16) as writer:
        for i, text in enumerate(texts):
            ids = [*tokenizer.encode(text), tokenizer.eod_id]
            writer.add_document(ids)
            records[i]["source"], records[i]["bytes"], tokens[i] = i % 2, len(text.encode()), len(ids)
    np.save(folder / f"{name}.documents.npy", records)

    def totals(chosen: np.ndarray) -> dict[str, int]:
        size = int(records["bytes"][chosen].sum())
        return {"documents": int(chosen.sum()), "tokens": int(tokens[chosen].sum()), "bytes": size}

    sources = {source: totals(records["source"] == i) for i, source in enumerate(("even", "odd"))}
    return {**totals(np.ones(len(texts), bool)), "sources": sources}


def tiny_values(dataset: Path, run_dir: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Configuration values of a two-layer run of 12 steps; `sections` override single fields."""
    values: dict[str, Any] = {
        "name": "tiny-test",
        "run_dir": str(run_dir),
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "qk_norm": True,
            "family": "qwen3",
            "max_position_embeddings": 64,
        },
        "data": {"datasets": [{"path": str(dataset)}]},
        "train": {
            "steps": 12,
            "seq_length": 32,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "precision": "fp32",
            "device": "cpu",
            "threads": 1,
            "log_interval": 4,
        },
        "optimizer": {"learning_rate": 5e-3},
        "schedule": {"warmup": 3},
        "eval": {"interval": 6, "samples": 1, "sample_tokens": 6, "max_tokens": 200},
        "checkpoint": {"interval": 4},
    }
    for section, fields in sections.items():
        values[section] = {**values[section], **fields}
    return values


def tiny_config(dataset: Path, run_dir: Path, **sections: dict[str, Any]) -> RunConfig:
    """`tiny_values` as a configuration."""
    return from_dict(RunConfig, tiny_values(dataset, run_dir, **sections))


def with_datasets(config: RunConfig, *paths: Path) -> RunConfig:
    """The same run on several datasets of equal weight."""
    datasets = tuple(DatasetSpec(path=str(path)) for path in paths)
    return dataclasses.replace(config, data=DataConfig(datasets=datasets, seed=config.data.seed))


@contextlib.contextmanager
def cheap_surroundings() -> Iterator[None]:
    """Runs in this process without measuring the GEMM peak and drawing the report, which take seconds.

    tests/train/test_trainer.py and tests/e2e have runs with both.
    """
    with (
        mock.patch("megalite.train.flops.measure_gemm_tflops", return_value=0.1),
        mock.patch("megalite.train.run.write_report", side_effect=lambda run_dir: run_dir / "report.html"),
    ):
        yield


def read_losses(run_dir: Path) -> dict[int, float]:
    """Loss of every step in metrics.jsonl; a step that stands there twice is an error."""
    losses: dict[int, float] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["step"] not in losses, f"step {record['step']} is recorded twice"
        losses[record["step"]] = record["loss"]
    return losses
