"""What a piece of code leaves in memory, and which collectives it called, seen below autograd."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """While it is entered: every storage that operations make, and how often each operation was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[op.name()] += 1
        out = op(*args, **(kwargs or {}))
        given = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            # A weak reference keeps the address from being used again, so it tells storages apart for good.
            if isinstance(x, Tensor) and (key := _key(x)) not in given and key not in self._made:
                storage = x.untyped_storage()
                self._made[key] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self, *without: Tensor) -> int:
        """Bytes of all storages made meanwhile that still exist, except for those of `without`."""
        left_out = {_key(x) for x in without}
        return sum(n for key, (ref, n) in self._made.items() if not ref.expired() and key not in left_out)

    def alive_at_rest(self, *without: Tensor) -> int:
        """`alive`, once gloo's threads have let go of the buffers of collectives that are done."""
        seen = [self.alive(*without)]
        while len(seen) < 10 or seen[-1] != seen[-10]:
            time.sleep(0.005)
            seen.append(self.alive(*without))
        return seen[-1]

    def collectives(self) -> dict[str, int]:
        """How often each collective was called."""
        return {name: n for name, n in self.calls.items() if name.startswith("c10d::")}


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata
