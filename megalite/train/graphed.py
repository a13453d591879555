"""A whole step, from token ids to new weights, as one CUDA graph: captured once, then replayed with other inputs.

A graph repeats what it recorded: the same kernels, on the same memory, with the same sizes. So micro-batches are
brought to a static form before they enter (`static_batch`), whatever changes from step to step is a tensor that the
inputs are copied into, and what a step leaves behind stands in tensors that the next replay overwrites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from megalite.data.loader import MicroBatch
from megalite.train.step import StepInputs, StepOutputs

LEAST_SEGMENTS = 64
"""Documents of a micro-batch are rounded up to this, or a power of two above: few sizes, so few graphs."""


class Graph(Protocol):
    """What captures a function once and then repeats its work."""

    def capture(self, function: Callable[[], StepOutputs]) -> None:
        """Record what the function does, without doing it."""

    def replay(self) -> StepOutputs:
        """Do it; the results stand in the same tensors each time."""


class CudaGraph:
    """A `torch.cuda.CUDAGraph` on the current stream.

    Args:
        pool: of `torch.cuda.graph_pool_handle`: memory that graphs share which never run at the same time.
    """

    def __init__(self, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool
        self._outputs: StepOutputs | None = None

    def capture(self, function: Callable[[], StepOutputs]) -> None:
        """See `Graph`. Other threads (the loader pins memory) may go on meanwhile."""
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(self._graph, self._pool, stream, capture_error_mode="thread_local"):
            self._outputs = function()

    def replay(self) -> StepOutputs:
        """See `Graph`."""
        assert self._outputs is not None, "nothing was captured"
        self._graph.replay()
        return self._outputs


class GraphedStep:
    """Runs steps as graphs, one for each number of micro-batches and of documents in them.

    The first step of each kind runs as it is: kernels are compiled and the state learns what a step does to it.

    Args:
        compute: the step; it must not look at values on the device, and update the state in place.
        seq_length: longest document, whatever the documents are.
        make_graph: makes an empty graph.
    """

    def __init__(
        self,
        compute: Callable[[StepInputs], StepOutputs],
        *,
        seq_length: int,
        make_graph: Callable[[], Graph],
    ) -> None:
        self.compute, self.seq_length, self.make_graph = compute, seq_length, make_graph
        self._seen: set[tuple[int, int]] = set()
        self._captured: dict[tuple[int, int], tuple[StepInputs, Graph]] = {}

    @property
    def graphs(self) -> int:
        """How many there are by now."""
        return len(self._captured)

    def run(self, inputs: StepInputs) -> StepOutputs:
        """One step; its results are good until the next one."""
        inputs = dataclasses.replace(inputs, batches=static_batches(inputs.batches, self.seq_length))
        key = len(inputs.batches), inputs.batches[0].cu_seqlens.numel()
        if key not in self._seen:
            self._seen.add(key)
            return self.compute(inputs)
        if key not in self._captured:
            static, graph = inputs.clone(), self.make_graph()
            graph.capture(lambda: self.compute(static))
            self._captured[key] = static, graph
        static, graph = self._captured[key]
        static.copy_(inputs)
        return graph.replay()


def static_batches(batches: Sequence[MicroBatch], seq_length: int) -> list[MicroBatch]:
    """The same micro-batches with equally many documents, the added ones empty, and one bound of their lengths."""
    most = max(batch.cu_seqlens.numel() - 1 for batch in batches)
    segments = max(LEAST_SEGMENTS, 1 << (most - 1).bit_length())
    return [static_batch(batch, segments, seq_length) for batch in batches]


def static_batch(batch: MicroBatch, segments: int, seq_length: int) -> MicroBatch:
    """A micro-batch with `segments` documents, of which those at the end are empty.

    Raises:
        ValueError: it has more documents, or a longer one.
    """
    missing = segments + 1 - batch.cu_seqlens.numel()
    if missing < 0 or batch.max_seqlen > seq_length:
        raise ValueError(
            f"a micro-batch of {batch.cu_seqlens.numel() - 1} documents of at most {batch.max_seqlen} tokens does not "
            f"fit {segments} documents of at most {seq_length}"
        )
    ends = batch.cu_seqlens.new_full((missing,), batch.tokens.shape[0])
    return dataclasses.replace(
        batch,
        cu_seqlens=torch.cat([batch.cu_seqlens, ends]),
        max_seqlen=seq_length,
        bounds=batch.bounds + (batch.tokens.shape[0],) * missing,
    )


def cuda_graphs(compute: Callable[[StepInputs], StepOutputs], seq_length: int) -> GraphedStep:
    """`GraphedStep` on the current CUDA device, all graphs in one pool of memory."""
    pool = torch.cuda.graph_pool_handle()
    return GraphedStep(compute, seq_length=seq_length, make_graph=lambda: CudaGraph(pool))
