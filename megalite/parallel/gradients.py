"""Where the gradient of a weight matrix goes: into its fp32 main gradient, at once or when a pipeline has idle time.

A layer's backward pass hands `add_weight_gradient` the two factors of the product dyᵀ · x. With a `GradientSink` on
the parameter the product is accumulated straight into the main gradient (no bf16 gradient is ever written), and who
reduces the gradient over data-parallel ranks hears of it. With a `WeightQueue` the product waits: zero-bubble
pipeline schedules compute gradients of activations first, because the stage before needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megalite_kernels.ops.linear import accumulate_weight_gradient, matrix, weight_gradient


class WeightQueue:
    """Products of one pipeline stage that wait for their turn."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def put(self, compute: Callable[[], None]) -> None:
        """Add one product to those that wait."""
        self._waiting.append(compute)

    def take(self) -> Callable[[], None]:
        """What computes, in order, everything put here so far (a micro-batch's W pass)."""
        waiting, self._waiting = self._waiting, []

        def run() -> None:
            while waiting:
                waiting.pop(0)()  # its factors are freed before the next product

        return run


class GradientSink:
    """Takes the gradient of one weight matrix.

    Args:
        main_grad: fp32 (or the weight's own wider type) of the weight's shape, accumulated in place.
        added: called after each accumulation.
        take: called before a step's first; from `start` to here main_grad may have no memory.
    """

    def __init__(
        self, main_grad: Tensor, added: Callable[[], None], take: Callable[[], None] = lambda: None
    ) -> None:
        self.main_grad = main_grad
        self.added = added
        self._take = take
        self.fresh = False
        """What main_grad holds is of an earlier step: whoever comes first overwrites it."""
        self.queue: WeightQueue | None = None
        """Set by a pipeline stage whose schedule has a W pass of its own."""

    def start(self) -> None:
        """Begin a step: what main_grad holds is of an earlier one."""
        self.fresh = True

    def finish(self) -> None:
        """End a step: zeros if no gradient came."""
        self.cleared()

    def cleared(self) -> Tensor:
        """The main gradient for who adds to it by other means: zeros if it is fresh."""
        main_grad, add = self.taken()
        return main_grad if add else main_grad.zero_()

    def taken(self) -> tuple[Tensor, bool]:
        """The main gradient for who adds to it, or overwrites it where the second is False."""
        fresh, self.fresh = self.fresh, False
        if fresh:
            self._take()
        return self.main_grad, not fresh

    def add(self, dy: Tensor, x: Tensor) -> None:
        """Accumulate dyᵀ · x for dy [T, O] and x [T, I], now or when the queue is emptied."""

        if self.queue is None and not torch.is_grad_enabled():  # in a backward pass: without detours
            self._add_now(dy, x)
            self.added()
        else:
            self._run(lambda: self._add_now(dy, x))

    def _add_now(self, dy: Tensor, x: Tensor) -> None:
        main_grad, add = self.taken()
        accumulate_weight_gradient(dy, x, main_grad, add=add)

    def add_product(self, add: Callable[[Tensor], None]) -> None:
        """Let `add` accumulate a product into the main gradient, now or when the queue is emptied."""
        self._run(lambda: add(self.cleared()))

    def add_gradient(self, gradient: Tensor) -> None:
        """Accumulate a gradient that is there, now."""
        main_grad, add = self.taken()
        main_grad.add_(gradient) if add else main_grad.copy_(gradient)
        self.added()

    def _run(self, compute: Callable[[], None]) -> None:
        if self.queue is None:
            self._compute(compute)
        else:
            self.queue.put(lambda: self._compute(compute))

    def _compute(self, compute: Callable[[], None]) -> None:
        with torch.no_grad():
            compute()
        self.added()


def set_sink(weight: nn.Parameter, sink: GradientSink | None) -> None:
    """Give a parameter its sink, or take it away."""
    weight.grad_sink = sink  # type: ignore[attr-defined]


def get_sink(weight: Tensor) -> GradientSink | None:
    """The parameter's sink, if it has one."""
    return getattr(weight, "grad_sink", None)


def announce(x: Tensor, sinks: Sequence[GradientSink]) -> Tensor:
    """x itself; when its gradient arrives, those of the weights that it was used with are complete, and told so.

    For graphs that accumulate into `main_grad` themselves, of which x is an input that needs a gradient.
    """
    return _Announce.apply(x, sinks) if sinks else x


class _Announce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sinks: Sequence[GradientSink]) -> Tensor:
        ctx.sinks = sinks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        for sink in ctx.sinks:
            sink.added()
        return dx, None


def add_weight_gradient(sink: GradientSink | None, dy: Tensor, x: Tensor) -> Tensor | None:
    """dyᵀ · x for dy [..., O] and x [..., I]: into the sink (returns None), or returned where there is none."""
    dy, x = matrix(dy), matrix(x)
    if sink is None:
        return weight_gradient(dy, x)
    sink.add(dy, x)
    return None
