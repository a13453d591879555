"""Inputs of products that nobody keeps: what made one makes it again in its own backward pass, which comes next."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Handover:
    """Brings the input of one product to its weight gradient, from the backward pass of the layer that made it.

    The product's backward pass comes first: it leaves word of what is to be done with its input (`wait`). The layer's
    backward pass reads what the input was made from anyway; it writes the input again, and brings it.
    """

    def __init__(self) -> None:
        self._use: Callable[[Tensor], None] | None = None

    def wait(self, use: Callable[[Tensor], None]) -> None:
        """Let `use` have the input when it is there."""
        self._use = use

    def bring(self, made: Tensor) -> None:
        """The input, made again; nobody waits for it where only some gradients were asked for."""
        use, self._use = self._use, None
        if use is not None:
            use(made)
