"""New weights brought from the ranks that own them to all, while the next forward pass already computes.

The gathers of all buckets start together, in the order in which the forward pass needs them; a module waits for its
own weights when it is called. Some weights are used without a call of the module that holds them (the output head's
matrix goes straight into the loss): which ones is seen in the first forward pass, and whatever is called before
them, in the order of registration, waits for them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from megalite.parallel.buckets import Bucket
from megalite.parallel.collectives import Work, start_all_gather_into, wait
from megalite.parallel.mesh import Axis


class WeightGatherer:
    """Gathers the owned slices of buckets, and makes modules wait for what they use.

    Args:
        model: its parameters are views of the buckets' weights.
        buckets: in the order in which the forward pass needs them.
        shard: ranks that own a slice of each bucket.
    """

    def __init__(self, model: nn.Module, buckets: Sequence[Bucket], shard: Axis) -> None:
        self.buckets, self.shard = buckets, shard
        self._running: list[Work] = []
        self._waited = 0
        number = {slot.parameter: i for i, bucket in enumerate(buckets) for slot in bucket.slots}
        self._needs: list[int] = []
        """How many buckets each module with weights waits for."""
        self._called: list[bool] = []
        self._hooks: list[RemovableHandle] = []
        for module, parameters in _callers(model):
            own = [number[parameter] for parameter in parameters]
            if own and shard.group is not None:
                self._needs.append(1 + max(own))
                self._called.append(False)
                self._hooks.append(module.register_forward_pre_hook(self._hook(len(self._needs) - 1)))
        self._learned = False

    def _hook(self, module: int) -> Any:
        def wait_for_weights(*_: Any) -> None:
            if not self._learned:
                self._called[module] = True
            self._wait(self._needs[module])

        return wait_for_weights

    def start(self) -> None:
        """Start bringing every rank's slices to all; before the first forward pass also wait for them."""
        self.settle()
        if self.shard.group is None:
            return
        if not self._learned and any(self._called):
            self._learn()
        self._running = [
            start_all_gather_into(bucket.weights, bucket.weights[bucket.own], self.shard)
            for bucket in self.buckets
        ]
        if not self._learned:
            self.settle()

    def settle(self) -> None:
        """Wait until all weights are there."""
        self._wait(len(self._running))
        self._running, self._waited = [], 0

    def release(self) -> None:
        """Remove the hooks."""
        self.settle()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _wait(self, count: int) -> None:
        """Until the first `count` buckets are there."""
        while self._waited < min(count, len(self._running)):
            wait(self._running[self._waited])
            self._waited += 1

    def _learn(self) -> None:
        """Let modules that are called wait for the weights of those after them that are not."""
        first = self._called.index(True)
        last_called = first
        for module, called in enumerate(self._called):
            last_called = module if called else last_called
            self._needs[last_called] = max(self._needs[last_called], self._needs[module])
        self._learned = True


def _callers(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules whose calls use weights, with those weights, in the order of registration."""
    whole = bool(getattr(module, "runs_whole", False))
    yield module, list(module.parameters(recurse=whole))
    if not whole:
        for child in module.children():
            yield from _callers(child)
