"""Micro-batches of packed samples, loaded ahead of the step that needs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalite.data.dataset import BlendedDataset, Sample
from megalite.data.indexed import Array
from megalite.errors import UserError
from megalite.parallel.context import ContextSplit

TENSORS = ("tokens", "labels", "positions", "cu_seqlens")
"""Fields of a `MicroBatch` that go to the device."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed sequences, one forward pass: T tokens in segments that do not see each other."""

    tokens: Tensor
    """[T] int64"""
    labels: Tensor
    """[T] int64; IGNORE_INDEX where there is no loss."""
    positions: Tensor
    """[T] int64, from 0 in each segment."""
    cu_seqlens: Tensor
    """[segments + 1] int32: where segments start, and T."""
    max_seqlen: int
    """Tokens of the longest segment."""
    bounds: tuple[int, ...]
    """`cu_seqlens` on the host."""

    def to(self, device: torch.device | str, non_blocking: bool = True) -> MicroBatch:
        """The same batch on another device."""
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MicroBatch:
        """The same batch in page-locked memory, from which copies to a GPU need not wait."""
        return self.map(lambda x: x.pin_memory())

    def copy_(self, other: MicroBatch) -> None:
        """Take over the tensors' values of another batch with equal shapes; what stands on the host stays."""
        for name in TENSORS:
            getattr(self, name).copy_(getattr(other, name), non_blocking=True)

    def part(self, split: ContextSplit) -> MicroBatch:
        """This rank's tokens of the batch; `cu_seqlens` and `bounds` stay those of the whole."""
        own: dict[str, Any] = {
            name: split.own_tokens(getattr(self, name)) for name in ("tokens", "labels", "positions")
        }
        return replace(self, **own)

    def map(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        """The same batch with every tensor changed."""
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in TENSORS}
        return replace(self, **changed)


def pack(tokens: Sequence[Array], labels: Sequence[Array], starts: Sequence[Array]) -> MicroBatch:
    """One batch of several pieces; `starts` are the segment starts within each piece, the first always 0."""
    sizes = np.array([piece.size for piece in tokens], dtype=np.int64)
    offsets = np.cumsum(sizes) - sizes
    total = int(sizes.sum())
    edges = np.append(np.concatenate([s + o for s, o in zip(starts, offsets, strict=True)]), total)
    lengths = np.diff(edges)
    positions = np.arange(total, dtype=np.int64) - np.repeat(edges[:-1], lengths)
    return MicroBatch(
        tokens=torch.from_numpy(np.concatenate(tokens)),
        labels=torch.from_numpy(np.concatenate(labels)),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(edges.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        bounds=tuple(edges.tolist()),
    )


def pack_samples(samples: Sequence[Sample]) -> MicroBatch:
    """One batch of whole samples; segments never cross from one to the next."""
    return pack([s.tokens for s in samples], [s.labels for s in samples], [s.boundaries for s in samples])


class TrainLoader:
    """This rank's micro-batches of each optimizer step.

    Micro-batch m of rank r holds the step's samples (m·dp_size + r)·mbs … + mbs - 1, so the samples of a step
    are the same for every dp_size and micro-batch size. `prefetch_step` starts loading in a background
    thread; `step` returns what it loaded, or loads now. Results never depend on the prefetching.

    Args:
        dataset: the samples.
        micro_batch_size: samples per micro-batch (mbs).
        dp_rank: this rank's place among the data-parallel ranks.
        dp_size: number of data-parallel ranks.
        prefetch: steps that may be loaded ahead.
        pin_memory: return batches in page-locked memory (for GPUs).
    """

    def __init__(
        self,
        dataset: BlendedDataset,
        *,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        if micro_batch_size < 1:
            raise UserError(f"micro_batch_size={micro_batch_size} must be at least 1")
        if not 0 <= dp_rank < dp_size:
            raise UserError(f"dp_rank={dp_rank} must be in [0, dp_size={dp_size})")
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        self._last_wait_s = 0.0
        self._pending: dict[tuple[int, int], Future[list[MicroBatch]]] = {}
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megalite-loader")
        self._closed = False

    @property
    def last_wait_s(self) -> float:
        """Seconds the last `step` call took: what the training loop waited for data."""
        return self._last_wait_s

    def prefetch_step(self, first_sample: int, num_samples: int) -> None:
        """Start loading a step in the background; does nothing if `prefetch` steps are loading already.

        Errors come out of the `step` call that asks for the result.
        """
        self._check(first_sample, num_samples)
        wanted = (first_sample, num_samples)
        if wanted not in self._pending and len(self._pending) < self.prefetch:
            self._pending[wanted] = self._executor.submit(self._load, first_sample, num_samples)

    def step(self, first_sample: int, num_samples: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step over samples first_sample … first_sample + num_samples - 1.

        Raises:
            UserError: num_samples is not a multiple of micro_batch_size · dp_size; the data is damaged.
        """
        self._check(first_sample, num_samples)
        began = time.perf_counter()
        pending = self._pending.pop((first_sample, num_samples), None)
        # Steps loaded ahead of an earlier position are never asked for again once the run moved past them.
        for stale in [wanted for wanted in self._pending if wanted[0] <= first_sample]:
            self._pending.pop(stale).cancel()
        batches = self._load(first_sample, num_samples) if pending is None else pending.result()
        self._last_wait_s = time.perf_counter() - began
        return batches

    def close(self) -> None:
        """Stop the background thread; steps still being loaded are dropped. May be called twice."""
        self._closed = True
        self._pending.clear()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, first_sample: int, num_samples: int) -> None:
        if self._closed:
            raise ValueError("the loader is closed")
        unit = self.micro_batch_size * self.dp_size
        if first_sample < 0 or num_samples < 1 or num_samples % unit:
            raise UserError(
                f"a step of {num_samples} samples from {first_sample} on cannot be divided: it must be a "
                f"multiple of micro_batch_size={self.micro_batch_size} x dp_size={self.dp_size} = {unit}"
            )

    def _load(self, first_sample: int, num_samples: int) -> list[MicroBatch]:
        size, batches = self.micro_batch_size, []
        for block in range(0, num_samples, size * self.dp_size):
            first = first_sample + block + self.dp_rank * size
            batch = pack_samples([self.dataset.sample(n) for n in range(first, first + size)])
            batches.append(batch.pin_memory() if self.pin_memory else batch)
        return batches
