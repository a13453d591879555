"""The names of the ops that run, compiled or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Ops(TorchDispatchMode):
    """`names` of the ops that run, and `largest` tensor with the vocabulary as a dim that they give."""

    def __init__(self, vocab: int = 0) -> None:
        super().__init__()
        self.names: list[str] = []
        self.vocab, self.largest = vocab, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and self.vocab in tensor.shape:
                self.largest = max(self.largest, tensor.numel())
        return out


def profiled(function: Callable[[], object]) -> set[str]:
    """Names of what runs, as the profiler saw it: inside compiled code too."""
    with torch.profiler.profile() as profile:
        function()
    return {event.name for event in profile.events()}
