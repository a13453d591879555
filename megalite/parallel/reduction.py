"""Gradients summed over data-parallel ranks bucket by bucket, while the backward pass still computes.

A bucket's reduction starts as soon as its last gradient has arrived. How many gradients a parameter gets in a
micro-batch (a tied matrix two, one whose weight gradient is deferred none where one would look for it) is not
declared anywhere but counted in the first step, whose reductions all start at its end. Buckets are launched in one
order that is the same on all ranks: one that is complete early waits for those before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megalite.parallel.buckets import Bucket
from megalite.parallel.collectives import (
    Work,
    start_all_gather_into,
    start_all_reduce,
    start_all_to_all,
    start_reduce_scatter_into,
    wait,
)
from megalite.parallel.mesh import Axis


class GradientReducer:
    """Counts gradients, and sums each bucket over the ranks when it is complete.

    Args:
        buckets: in the order in which they are launched.
        shard: ranks that own a slice of each bucket; this one gets the sum of its slice.
        replicate: ranks that own the same slice.
        wire: type in which gradients travel; sums are made in the buckets' own.
        watch: look at the gradients before they are summed, for `local_finite`: a pass over all of them.
    """

    def __init__(
        self, buckets: Sequence[Bucket], shard: Axis, replicate: Axis, wire: torch.dtype, *, watch: bool
    ) -> None:
        self.buckets = buckets
        self.shard, self.replicate, self.wire, self.watch = shard, replicate, wire, watch
        narrow = wire != buckets[0].main_grad.dtype
        self._chained = replicate.group is not None and (narrow or shard.group is not None)
        self._per_microbatch: list[list[int]] | None = None
        """Gradients that each parameter of each bucket gets in a micro-batch; None until they were counted."""
        self._expected: list[list[int]] = []
        self._arrived: list[list[int]] = []
        self._incomplete: list[int] = []
        """Parameters of each bucket that wait for gradients; never 0 where the number is not known."""
        self._running: list[_Reduction] = []
        self._sums: list[Tensor] = []
        self._num_microbatches = 0
        self.start_step(0)

    def start_step(self, num_microbatches: int) -> None:
        """Expect the gradients of as many micro-batches."""
        self._num_microbatches = num_microbatches
        self._arrived = [[0] * len(bucket.slots) for bucket in self.buckets]
        counts = self._per_microbatch or self._arrived
        self._expected = [[count * num_microbatches for count in bucket] for bucket in counts]
        known = [all(bucket) for bucket in self._expected]
        self._incomplete = [
            len(bucket.slots) if sure else -1 for bucket, sure in zip(self.buckets, known, strict=True)
        ]
        self._running, self._sums = [], []

    def arrived(self, bucket: int, slot: int) -> None:
        """A gradient was added to parameter number `slot` of a bucket.

        Raises:
            ValueError: the bucket is being reduced already.
        """
        if bucket < len(self._running):
            raise ValueError(
                f"a gradient of {self.buckets[bucket].slots[slot].name} arrived after those of all "
                f"{self._num_microbatches} micro-batches that start_step was told of: run as many, each with the same "
                "layers"
            )
        self._arrived[bucket][slot] += 1
        if self._arrived[bucket][slot] == self._expected[bucket][slot]:
            self._incomplete[bucket] -= 1
            while len(self._running) < len(self.buckets) and self._incomplete[len(self._running)] == 0:
                self._launch()

    def finish(self) -> None:
        """Launch what was not, wait for all; the owned slices then hold the sums."""
        while len(self._running) < len(self.buckets):
            self._launch()
        for reduction in self._running:
            reduction.finish()
        if self._per_microbatch is None and self._num_microbatches:
            self._per_microbatch = [self._learn(bucket) for bucket in self._arrived]

    def _learn(self, arrived: list[int]) -> list[int]:
        """Gradients per micro-batch; 0 (which no bucket is launched early by) where micro-batches differ."""
        number = self._num_microbatches
        return [0 if count % number else count // number for count in arrived]

    def local_finite(self) -> Tensor:
        """Whether the gradients were finite before they were summed over ranks, once finished: bool scalar."""
        return is_finite(torch.stack(self._sums)).all()

    @torch.no_grad()
    def _launch(self) -> None:
        """Start the next bucket, and the second collective of the one before if its sum takes several."""
        bucket = self.buckets[len(self._running)]
        # A sum: squares of finite numbers may overflow. Afterwards it would be every rank's number.
        if self.watch:
            self._sums.append(bucket.main_grad.sum())
        # Only where another collective follows: a wait without one would expose what the backward pass hides.
        if self._running and self._chained:
            self._running[-1].advance()
        self._running.append(_Reduction(bucket, self.shard, self.replicate, self.wire))


class _Reduction:
    """The sum of one bucket under way: one collective, or several that follow one another."""

    def __init__(self, bucket: Bucket, shard: Axis, replicate: Axis, wire: torch.dtype) -> None:
        own = bucket.main_grad[bucket.own]
        if wire == bucket.main_grad.dtype:
            self._stages = _sum_in_place(bucket.main_grad, own, shard, replicate)
        else:
            self._stages = _sum_narrow(bucket.main_grad, own, shard, replicate, wire)
        self._work: Work = None
        self._next()

    def _next(self) -> None:
        self._work = next((work for work in self._stages if work is not None), None)

    def advance(self) -> None:
        """Wait for the collective that runs and start the next, if there is one."""
        work, self._work = self._work, None
        wait(work)
        self._next()

    def finish(self) -> None:
        """Until the sum is there."""
        while self._work is not None:
            self.advance()


def _sum_in_place(whole: Tensor, own: Tensor, shard: Axis, replicate: Axis) -> Iterator[Work]:
    """Reduce-scatter inside, all-reduce between."""
    yield start_reduce_scatter_into(own, whole, shard)
    yield start_all_reduce(own, replicate)


def _sum_narrow(
    whole: Tensor, own: Tensor, shard: Axis, replicate: Axis, wire: torch.dtype
) -> Iterator[Work]:
    """The same with every number rounded to `wire` when it is sent, and sums made in the type of `own`.

    A collective that reduces would add in the type it sends. All-to-all brings each rank what it has to sum.
    """
    if shard.group is not None:
        received, work = start_all_to_all(whole.to(wire), shard)
        yield work
        torch.sum(received.view(shard.size, -1), 0, dtype=own.dtype, out=own)
    if replicate.group is not None:
        received, work = start_all_to_all(own.to(wire), replicate)
        yield work
        part = received.view(replicate.size, -1).sum(0, dtype=own.dtype).to(wire)
        yield start_all_gather_into(received, part, replicate)
        own.copy_(received)


def is_finite(x: Tensor) -> Tensor:
    """`torch.isfinite` in two launches instead of four: what is infinite or NaN is no number minus itself."""
    return (x - x) == 0
