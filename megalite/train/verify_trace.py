"""What goes through the layers, recorded: where a wrong layout first differs from one process.

Recorded are the outputs of embeddings, norms, attention and MLP of one micro-batch, and in the backward pass the
gradients of the loss by them. Each rank has some of the tokens (context and sequence parallelism) and some of the
layers; rows are numbered by their place in the whole micro-batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megalite.config import ParallelConfig
from megalite.parallel.context import ContextSplit
from megalite.parallel.mesh import Mesh
from megalite_kernels.ops.quantized import value_of

_TRACED = re.compile(
    r"embedding|position_embedding|final_norm|layers\.\d+\.(attention_norm|attention|mlp_norm|mlp)"
)


@dataclass(slots=True)
class Trace:
    """Recorded tensors by module name, each [rows, H] in float64."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)

    def follow(self, model: nn.Module) -> Trace:
        """Record each module's next call. The first call of a step is for the first micro-batch in every schedule."""
        for name, module in model.named_modules():
            if _TRACED.fullmatch(name):
                self.handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def stop(self) -> None:
        """Record nothing more."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _hook(self, name: str) -> Callable[..., None]:
        def keep_gradient(gradient: Tensor) -> None:
            self.gradients.setdefault(name, _copy(gradient))

        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            out = value_of(output[0] if isinstance(output, tuple) else output)
            if name in self.outputs:
                return
            self.outputs[name] = _copy(out)
            if out.requires_grad:
                out.register_hook(keep_gradient)

        return record


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu().clone()


def rows_here(mesh: Mesh, parallel: ParallelConfig, bounds: tuple[int, ...]) -> list[int]:
    """Tokens of a micro-batch whose activations between layers are on this rank."""
    rows = torch.arange(bounds[-1])
    if mesh.cp.size > 1:
        rows = ContextSplit(mesh.cp, parallel.cp_method, bounds).own_tokens(rows)
    if parallel.sequence_parallel and mesh.tp.size > 1:
        rows = rows[mesh.tp.shard(rows.shape[0])]
    return rows.tolist()


def runs_of(rows: list[int]) -> Iterator[tuple[int, int, int]]:
    """(place in `rows`, first row, count) of runs of neighbouring rows."""
    begin = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1:
            yield begin, rows[begin], place - begin
            begin = place
