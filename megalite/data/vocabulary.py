"""The tokenizer's training: a bounded sample of training text, chosen by content, and a process of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megalite.data.encode import UnitTask, used_documents
from megalite.data.order import key, mix
from megalite.data.tokenize import Tokenizer

SAMPLE_KEY = 0x5A3


@dataclass(frozen=True, slots=True)
class SampleTask:
    """Write the unit's share of the tokenizer's training sample into `folder`."""

    base: UnitTask
    folder: str
    threshold: int
    """A training document is sampled if its keyed hash is below this."""
    seed: int


@dataclass(frozen=True, slots=True)
class TrainTask:
    """Train a tokenizer on the sample that lies in `folder`, and save it as `path`."""

    folder: str
    path: str
    limit: int
    """Characters of the sample that are used at most."""
    vocab_size: int
    eod_token: str


def sample_unit(task: SampleTask) -> int:
    """Write sampled training documents as JSON lines; returns their bytes."""
    path = Path(task.folder) / f"{task.base.unit.number:06d}.jsonl"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    seed_key = key(task.seed, SAMPLE_KEY)
    written = 0
    with open(temporary, "w", encoding="utf-8") as out:
        for used in used_documents(task.base):
            if used.split == "train" and mix(used.split_hash ^ seed_key) < task.threshold:
                out.write(json.dumps(used.document.data.decode("utf-8")) + "\n")
                written += len(used.document.data)
    os.replace(temporary, path)
    return written


def train_tokenizer(task: TrainTask) -> None:
    """Train and save; the same sample gives the same tokenizer."""
    texts = _sampled_texts(Path(task.folder), task.limit)
    Tokenizer.train(texts, vocab_size=task.vocab_size, eod_token=task.eod_token).save(task.path)


def _sampled_texts(folder: Path, limit: int) -> Iterator[str]:
    """The sampled documents in input order, as long as their characters sum up to at most `limit`."""
    total = 0
    for path in sorted(folder.glob("*.jsonl")):
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)
                total += len(text)
                if total > limit:
                    return
                yield text
