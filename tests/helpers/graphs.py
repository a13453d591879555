"""What a step runs, op by op: its recording, and a stand-in for a CUDA graph that replays it on the CPU.

Like a graph the stand-in records without doing (what the recording wrote is put back), repeats the recorded ops on
the recorded tensors, and knows nothing of Python: a value that entered through Python is the recording's for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

SYNCHRONISING = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique",
    "aten::equal",
)
"""Ops that make the host wait for the device (copies between devices are found by their devices)."""
ALLOCATING = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")


@dataclass
class Op:
    """One op that ran."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any]

    @property
    def name(self) -> str:
        """E.g. aten::mul."""
        return str(self.func.name()).partition(".")[0]

    @property
    def inputs(self) -> list[Any]:
        """All arguments, flat."""
        return list(tree_flatten((self.args, self.kwargs))[0])

    @property
    def is_view(self) -> bool:
        """It computes nothing: its result is a part of what it was given."""
        return any(r.alias_info is not None and not r.alias_info.is_write for r in self.func._schema.returns)

    @property
    def written(self) -> list[Tensor]:
        """Arguments that it changes."""
        names = [
            a.name for a in self.func._schema.arguments if a.alias_info is not None and a.alias_info.is_write
        ]
        given = {
            a.name: value for a, value in zip(self.func._schema.arguments, self.args, strict=False)
        } | self.kwargs
        return [x for x in tree_flatten([given.get(name) for name in names])[0] if isinstance(x, Tensor)]

    @property
    def launches(self) -> bool:
        """On a GPU it would run a kernel."""
        return not self.is_view and self.name not in ALLOCATING

    @property
    def synchronises(self) -> bool:
        """On a GPU the host would wait: a value is asked for, or travels between devices."""
        devices = {x.device.type for x in self.inputs + self.outputs if isinstance(x, Tensor)}
        travels = self.name in ("aten::_to_copy", "aten::copy_") and len(devices) > 1
        return travels or self.name.startswith(SYNCHRONISING)

    def __str__(self) -> str:
        return f"{self.func.name()}({', '.join(map(_words, self.inputs))}) -> {', '.join(map(_words, self.outputs))}"


def _words(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device}"


class Recorder(TorchDispatchMode):
    """Records every op inside the `with` block, those of the backward pass too."""

    def __init__(self, before: Callable[[Op], None] = lambda op: None) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.before = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = Op(func, tuple(args), dict(kwargs or {}), [])
        self.before(op)
        out = func(*args, **(kwargs or {}))
        op.outputs = list(tree_flatten(out)[0])
        self.ops.append(op)
        return out


class StandIn:
    """A `megalite.train.graphed.Graph` on the CPU."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self._outputs: Any = None
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}

    def capture(self, function: Callable[[], Any]) -> None:
        """Record, then put back whatever was written that existed before."""
        made: set[int] = set()

        def save(op: Op) -> None:
            for x in op.written:
                storage = x.untyped_storage()
                if storage._cdata not in made and storage._cdata not in self._saved:
                    self._saved[storage._cdata] = (_whole(x), _whole(x).clone())

        def note(op: Op) -> None:
            made.update(_storages(op.outputs) - _storages(op.inputs))

        recorder = Recorder(lambda op: (note(recorder.ops[-1]) if recorder.ops else None, save(op))[-1])
        with recorder:
            self._outputs = function()
        self.ops = recorder.ops
        for live, before in self._saved.values():
            live.copy_(before)

    @torch.no_grad()
    def replay(self) -> Any:
        """Every recorded op again, its result into the recorded tensors."""
        for op in self.ops:
            if op.is_view:
                continue
            fresh = tree_flatten(op.func(*op.args, **op.kwargs))[0]
            for old, new in zip(op.outputs, fresh, strict=True):
                if isinstance(old, Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)
        return self._outputs


def _whole(x: Tensor) -> Tensor:
    """All of a tensor's memory."""
    size = x.untyped_storage().nbytes() // x.element_size()
    return x.detach().as_strided((size,), (1,), 0)


def _storages(values: list[Any]) -> set[int]:
    return {x.untyped_storage()._cdata for x in values if isinstance(x, Tensor)}
