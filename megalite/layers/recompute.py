"""What a layer's backward pass computes again instead of the forward pass keeping it (activation checkpointing).

Five things can be made again, from cheap to dear:

- norm: the outputs of both norms, which only the projections after them keep, from the residual stream that the
  norms keep anyway. One pass over memory each, or less.
- activation: the output of the MLP's activation, which only `down_proj` keeps, from `gate_up`. One pass, or less.
- attention: queries and keys after head norms or, with ring attention, rotation, from the projection's output. One
  pass. (Where only a rotation stands before attention, attention turns them itself and keeps the projection's output
  alone.) The output and the log-sum-exp stay: `o_proj` keeps the output anyway, and the kernel's backward pass makes
  the probabilities again by itself, so that running the whole core again would free nothing but 4 bytes per token and
  head.
- mlp: everything in the MLP but the sum that its norm starts from: the norm's output, the product after it and the
  activation's output. The product is a third to a half of a layer's multiplications forward, and what it frees
  beside norm and activation 40 to 50 % of what a layer keeps then: a byte costs less than with full.
- full: everything in the layer but the sum of residual stream and branch that it starts from.

The first three drop what the *consumer* of a tensor saves. Where a norm's or an activation's output feeds a product
whose weight gradient has a sink, the producer's own backward pass, which comes next and reads all that the tensor is
made from, writes it again and brings it (`megalite.parallel.handover`): on a CPU one write in place of a pass.
Elsewhere (`made_again`) the tensor is made again when the consumer's backward pass asks for it. No projection and no
collective runs twice. With context parallelism by Ulysses the attention kernel keeps the exchanged heads, so
"attention" frees nothing there.

mlp and full run again up to the activation, which writes its output again in its own backward pass where a handover
takes it, and runs a second time elsewhere; `down_proj` does not, as nothing needs what it gives. Of the collectives of
full the two all-gathers before the column-parallel products, the reduction after `o_proj` and the context-parallel
exchange run a second time, of mlp one all-gather; the reduction after `down_proj` does not.

There is no dropout anywhere, so no random state is kept.

Source: Korthikanti et al., arXiv 2205.05198 (selective recomputation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

RECOMPUTE_MARK = "megalite::recompute"
"""Name that everything run for the second time stands under in a profile: 6 us for each layer that does."""


@dataclass(frozen=True, slots=True)
class Recompute:
    """What one layer's backward pass makes again; by default nothing."""

    norm: bool = False
    activation: bool = False
    attention: bool = False
    mlp: bool = False
    """norm and activation of the MLP are then in it."""
    full: bool = False
    """The others are then in it."""


KEEP = Recompute()
"""Everything is kept."""
FULL = Recompute(full=True)
"""Only what the layer starts from is kept."""


@contextmanager
def made_again(
    again: bool, outputs: Sequence[Tensor], make: Callable[[], Sequence[Tensor]]
) -> Iterator[None]:
    """While the consumers of `outputs` run: what they save of them is dropped, and made again when they need it.

    Args:
        again: False does nothing.
        outputs: contiguous tensors.
        make: gives equal tensors, from tensors that are kept anyway. Called without a graph, once for each
            backward pass. Nobody else may need what it gives: a consumer may write there.
    """
    if not again or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield
        return
    source = _Source(make)
    storages = [_storage(output) for output in outputs]

    def pack(tensor: Tensor) -> Any:
        storage = _storage(tensor)
        if storage not in storages:
            # Detached: a node that saves its own output would otherwise keep itself alive.
            return tensor.detach()
        source.wanted = True
        return _Dropped(source, storages.index(storage), tensor)

    with saved_tensors_hooks(pack, lambda kept: kept.make() if isinstance(kept, _Dropped) else kept):
        yield
    if not source.wanted:  # autograd keeps the hooks, and so what `make` reads
        source.make = tuple


def run_again(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, of which the backward pass keeps only the tensors among the arguments."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if not torch.compiler.is_compiling():
        options["context_fn"] = lambda: (nullcontext(), record_function(RECOMPUTE_MARK))
    return checkpoint(function, *arguments, **options)


def run_marked(again: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`; in a compiled graph marked to be made again, there in place of `made_again`.

    The compiler cannot trace hooks on saved tensors, but drops what its graph shows no need for.
    """
    if again and torch.compiler.is_compiling():
        return run_again(function, *arguments)
    return function(*arguments)


def tap(x: Tensor) -> Tensor:
    """x itself, at the end of what `run_again` runs, in a form that `tapped` can ask for again."""
    return x if torch.compiler.is_compiling() else _Tap.apply(x)


def tapped(x: Tensor) -> Callable[[], Sequence[Tensor]]:
    """What makes the result of `tap` again: it starts the second run of `run_again`, before its own backward pass.

    Without it the consumer of x would have to be part of that run, and be computed twice for nothing.
    """
    if torch.compiler.is_compiling():  # where `made_again` does nothing
        return tuple
    node = x.grad_fn
    assert node is not None
    return lambda: node.saved_tensors  # type: ignore[attr-defined]


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx


class _Source:
    """Makes several tensors in one go and hands each out once."""

    def __init__(self, make: Callable[[], Sequence[Tensor]]) -> None:
        self.make = make
        self.wanted = False
        self._ready: dict[int, Tensor] = {}

    def take(self, index: int) -> Tensor:
        if index not in self._ready:
            with torch.no_grad(), record_function(RECOMPUTE_MARK):
                self._ready = dict(enumerate(self.make()))
        return self._ready.pop(index)


class _Dropped:
    """Stands where a consumer would have saved one of the outputs, or a view of it."""

    def __init__(self, source: _Source, index: int, tensor: Tensor) -> None:
        self._source, self._index = source, index
        self._view = (tensor.shape, tensor.stride(), tensor.storage_offset())

    def make(self) -> Tensor:
        return self._source.take(self._index).as_strided(*self._view)


def _storage(tensor: Tensor) -> int:
    """What tells storages apart, on the meta device too."""
    return tensor.untyped_storage()._cdata
