"""What a checkpoint will hold, copied to the host while training goes on, with fingerprints of the live tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from megalite.models.families import HfTensor
from megalite.parallel.state import ModelState
from megalite.train.checkpoint_blocks import Block, blocks_of
from megalite.train.fingerprint import fingerprint


@dataclass(slots=True)
class Snapshot:
    """A frozen copy, on the host, of what this process may have to write of one checkpoint."""

    step: int
    hf_tensors: list[HfTensor]
    blocks: dict[MetadataIndex, Block]
    """By key and offset; values on the host, laid out as in the files."""
    fingerprints: dict[MetadataIndex, str]
    """Of the live values."""
    trainer: dict[str, Tensor]
    metadata: dict[str, Any]
    """What else the manifest records."""
    texts: dict[str, str] = field(default_factory=dict)
    """Small files beside the tensors: config.json, tokenizer files."""


def take_snapshot(
    state: ModelState,
    hf_tensors: list[HfTensor],
    trainer_state: dict[str, Tensor],
    *,
    step: int,
    metadata: dict[str, Any],
    texts: dict[str, str],
    tied_rank: int = 0,
    only: Collection[MetadataIndex] | None = None,
) -> Snapshot:
    """Copy this process's part of the live state to the host, with fingerprints of the live tensors.

    Args:
        state: masters and moments.
        hf_tensors: the family's map from pieces to files' tensors.
        trainer_state: small tensors of the trainer, equal on all processes.
        step: completed optimizer steps.
        metadata: what else the manifest records (config, environment, data fingerprint).
        texts: contents of the small files, by relative path.
        tied_rank: this process's place among the stages that share a tied weight.
        only: what an earlier save with the same layout found to be this process's to write; None: not known.
    """
    blocks, fingerprints = {}, {}
    for block in blocks_of(state, hf_tensors, tied_rank=tied_rank):
        index = MetadataIndex(block.key, block.offset)
        if block.second or (only is not None and index not in only):
            continue
        values = block.values
        host = torch.empty(block.shape, dtype=values.dtype).copy_(values)
        blocks[index] = dataclasses.replace(block, live=host, remainder=None)
        fingerprints[index] = fingerprint(values)
    trainer = {k: v.detach().cpu().clone() for k, v in trainer_state.items()}
    return Snapshot(step, hf_tensors, blocks, fingerprints, trainer, metadata, texts)
