"""Validation: loss and bits per byte on held-out documents, per source, and sampled texts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalite.config import IGNORE_INDEX, EvalConfig
from megalite.data.loader import MicroBatch, pack
from megalite.data.tokenize import Tokenizer
from megalite.data.validation import ValidationSet, ValSelection
from megalite.parallel.collectives import all_reduce_max, all_reduce_sum
from megalite.parallel.mesh import Mesh
from megalite.train.generate import LanguageModel, generate
from megalite.train.replica import Replica


@torch.no_grad()
def validate(
    replica: Replica,
    validation: ValidationSet,
    config: EvalConfig,
    *,
    seq_length: int,
    tokens_per_batch: int,
    complete: bool,
) -> dict[str, Any]:
    """Score held-out documents, divided over the data-parallel processes.

    Each document is one text: it begins after an end-of-document token and ends with one, and every token is
    scored exactly once, in windows of `seq_length` that repeat `config.overlap` of the text before them.

    Args:
        replica: the model; the processes that hold it together score the same documents.
        complete: score everything; otherwise a fixed subset of whole documents of about `config.max_tokens`.

    Returns:
        The record of ``evals.jsonl`` without step, tokens and samples.
    """
    start = time.perf_counter()
    mesh = replica.mesh
    selection = validation.select(None if complete else config.max_tokens)
    sums = torch.zeros(2, len(validation.sources), dtype=torch.float64, device=mesh.device)
    batches = validation.micro_batches(
        seq_length,
        config.overlap,
        tokens_per_batch=tokens_per_batch,
        dp_rank=mesh.data.rank,
        dp_size=mesh.data.size,
        selection=selection,
    )
    if replica.gathers_weights:
        batches = _in_step(batches, mesh, seq_length)
    for batch, source_of_segment in batches:
        batch = batch.to(mesh.device)
        losses = replica.token_losses(batch)
        lengths = batch.cu_seqlens.long().diff()
        source = torch.from_numpy(source_of_segment).to(mesh.device).repeat_interleave(lengths)
        valid = (batch.labels != IGNORE_INDEX).double()
        sums[0].index_add_(0, source, losses.double() * valid)
        sums[1].index_add_(0, source, valid)
    all_reduce_sum(sums, mesh.data)
    return _summary(sums, validation.sources, selection, time.perf_counter() - start)


Scored = tuple[MicroBatch, NDArray[np.int64]]
"""A batch, and the source of each of its segments."""


def _in_step(batches: Iterator[Scored], mesh: Mesh, seq_length: int) -> Iterator[Scored]:
    """The batches, and after them empty ones until no rank has any left: each forward pass is one of all ranks."""
    nothing = np.zeros(seq_length, dtype=np.int64)
    filler = pack([nothing], [np.full_like(nothing, IGNORE_INDEX)], [nothing[:1]])
    while True:
        item = next(batches, None)
        left = torch.tensor(int(item is not None), device=mesh.device)
        if not all_reduce_max(left, mesh.data):
            return
        yield item or (filler, nothing[:1])


def _summary(sums: Tensor, names: list[str], selection: ValSelection, seconds: float) -> dict[str, Any]:
    losses, counts = sums.cpu().tolist()
    sources = {
        name: _score(loss, int(count), int(num_bytes))
        for name, loss, count, num_bytes in zip(names, losses, counts, selection.bytes, strict=True)
        if count
    }
    total = _score(sum(losses), int(sum(counts)), int(selection.bytes.sum()))
    return {
        "val_loss": total["loss"],
        "val_bits_per_byte": total["bits_per_byte"],
        "val_tokens": total["tokens"],
        "val_bytes": total["bytes"],
        "complete": selection.complete,
        "seconds": seconds,
        "sources": sources,
    }


def _score(loss_sum: float, tokens: int, num_bytes: int) -> dict[str, Any]:
    """Nats per token, and bits per byte of the text that the tokens spell."""
    return {
        "loss": loss_sum / tokens if tokens else math.nan,
        "bits_per_byte": loss_sum / math.log(2.0) / num_bytes if num_bytes else math.nan,
        "tokens": tokens,
        "bytes": num_bytes,
    }


def sample_texts(
    model: LanguageModel, tokenizer: Tokenizer, config: EvalConfig, *, seed: int
) -> list[dict[str, Any]]:
    """Texts the model writes, `config.samples` of them, from the configured prompts in turn."""
    samples = []
    for i in range(config.samples):
        prompt = config.prompts[i % len(config.prompts)] if config.prompts else ""
        prompt_ids = [tokenizer.eod_id, *tokenizer.encode(prompt)]
        room = model.config.max_position_embeddings - len(prompt_ids)
        ids = generate(
            model,
            prompt_ids,
            max_new_tokens=min(config.sample_tokens, room),
            temperature=config.temperature,
            seed=seed + i,
            eod_id=tokenizer.eod_id,
        )
        samples.append(
            {
                "prompt": prompt,
                "text": tokenizer.decode(ids),
                "temperature": config.temperature,
                "tokens": ids,
                "new_tokens": len(ids),
            }
        )
    return samples
