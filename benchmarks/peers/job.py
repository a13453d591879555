"""What every contender of a run is given: one description, the same first weights, the same tokens."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalite.config import DataConfig, DatasetSpec, ModelConfig, OptimizerConfig, ParallelConfig
from megalite.config_values import from_dict, to_dict
from megalite.data.dataset import DOCUMENT_RECORD, load_datasets
from megalite.data.indexed import IndexedWriter
from megalite.data.loader import MicroBatch, TrainLoader
from megalite.data.order import StreamOrder, key
from megalite.data.tokenize import Tokenizer
from megalite.interop.hf import export_folder, folder_texts, model_pieces, read_pieces
from megalite.models.transformer import Transformer
from megalite.parallel.random import initialize

SEED = 1
"""Key of the initial weights: `train.seed` of our trainer."""
TINY = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 128, "vocab_size": 512, "head_dim": 0}
"""The model whose two steps load all code before memory is counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One training job, without what does the training."""

    folder: str
    """Holds data/ and, for peers, weights/."""
    model: ModelConfig
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    precision: str
    """fp32, bf16 or fp8."""
    device: str
    """cpu or cuda."""
    threads: int
    clock: str
    """wall or process."""
    keep_pages: bool
    """On CPUs: glibc keeps freed pages."""
    steps: int
    """The most that any contender may take."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)

    @property
    def data_seed(self) -> int:
        """Key of the order of samples."""
        return DataConfig().seed

    @property
    def datasets(self) -> tuple[DatasetSpec, ...]:
        """The made-up tokens."""
        return (DatasetSpec(path=str(Path(self.folder) / "data")),)

    def to_json(self) -> str:
        """One line; `from_json` is the inverse."""
        return json.dumps({f.name: to_dict_value(getattr(self, f.name)) for f in dataclasses.fields(self)})

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job of a line that `to_json` made."""
        values = json.loads(text)
        kinds = {"model": ModelConfig, "optimizer": OptimizerConfig, "parallel": ParallelConfig}
        built = {name: from_dict(kind, values.pop(name), name) for name, kind in kinds.items()}  # type: ignore[type-var]
        return cls(**values, **built)

    def tiny(self, folder: Path) -> Job:
        """The same job with a tiny model on tokens of its own."""
        heads = min(2, self.model.num_attention_heads)
        sizes = TINY | {"num_attention_heads": heads, "num_key_value_heads": heads}
        model = dataclasses.replace(self.model, **sizes)  # type: ignore[arg-type]
        small = dataclasses.replace(
            self,
            folder=str(folder),
            model=model,
            seq_length=32,
            micro_batch_size=1,
            global_batch_size=1,
            steps=2,
        )
        return dataclasses.replace(small, parallel=ParallelConfig())


def to_dict_value(value: Any) -> Any:
    """Plain values of a field."""
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def write_data(job: Job, document_tokens: int = 0) -> None:
    """A prepared dataset of random tokens for the job's steps, with a tokenizer of bytes only.

    Speed does not depend on what the tokens say. There are 256 different ones, so that the loss falls from the
    first step on, and losses show what was trained.

    Args:
        job: what it is for.
        document_tokens: mean length of documents, at whose ends attention ends; 0: no sample has a boundary.
    """
    folder = Path(job.folder) / "data"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    tokenizer = Tokenizer.train(["made up"], vocab_size=257)
    splits = {}
    samples = job.steps * job.global_batch_size
    for name, tokens in (("train", unbroken_tokens(job, samples)), ("validation", 2000)):
        with IndexedWriter(folder / name, np.int32) as writer:
            for length in _lengths(tokens, document_tokens, generator):
                body = generator.integers(1, min(job.model.vocab_size, 257), size=length)
                writer.add_document(np.append(body[:-1], tokenizer.eod_id) if document_tokens else body)
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


def _lengths(tokens: int, document_tokens: int, generator: np.random.Generator) -> Iterator[int]:
    left = tokens
    while left > 0:
        length = 2 + int(generator.geometric(1 / document_tokens)) if document_tokens else left
        yield min(length, max(left, 2))
        left -= length


def unbroken_tokens(job: Job, samples: int) -> int:
    """Length of a stream in which none of the first `samples` samples runs over its end.

    The order of samples is a function of the length: more are tried until the one sample that wraps comes later.
    """
    for pieces in itertools.count(samples + 1):
        tokens = pieces * job.seq_length
        order = StreamOrder(tokens, job.seq_length, key(job.data_seed, 0))
        if all(order.start(n) + job.seq_length < tokens for n in range(samples)):
            return tokens
    raise AssertionError("unreachable")


def write_weights(job: Job) -> None:
    """The initial weights that our trainer draws for itself, as a Hugging Face folder for everybody else."""
    model = Transformer(job.model)
    initialize(model, SEED)
    export_folder(Path(job.folder) / "weights", job.model, model_pieces(model), texts=folder_texts(job.model))


def read_weights(job: Job) -> dict[str, torch.Tensor]:
    """Canonical name → fp32 tensor of the initial weights."""
    return dict(read_pieces(Path(job.folder) / "weights", job.model))


class Batches:
    """The micro-batches of each step that our trainer reads, as [samples, S] for models without packing."""

    def __init__(self, job: Job) -> None:
        dataset = load_datasets(job.datasets, seq_length=job.seq_length, seed=job.data_seed)
        self.loader = TrainLoader(dataset, micro_batch_size=job.micro_batch_size)
        self.job = job

    def step(self, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(tokens, labels) of each micro-batch of a step (0-based), on the device.

        Raises:
            ValueError: a document ends inside a sample, which these models cannot know.
        """
        size = self.job.global_batch_size
        return [self._rectangle(batch) for batch in self.loader.step(number * size, size)]

    def _rectangle(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        length = self.job.seq_length
        if batch.bounds != tuple(range(0, batch.tokens.numel() + 1, length)):
            raise ValueError(f"documents end inside samples, at {batch.bounds}: peers would see across them")
        pair = (batch.tokens.view(-1, length), batch.labels.view(-1, length))
        return tuple(x.to(self.job.device) for x in pair)  # type: ignore[return-value]

    def close(self) -> None:
        """Stop the loader."""
        self.loader.close()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
