"""Finds kernels that read or write outside their tensors: NaN lies before and behind every one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

MARGIN = 128


def surrounded(x: Tensor) -> Tensor:
    """A copy of x in the middle of NaN."""
    around = torch.full((x.numel() + 2 * MARGIN,), torch.nan, dtype=x.dtype)
    return around[MARGIN : MARGIN + x.numel()].view(x.shape).copy_(x)


@contextmanager
def surrounded_outputs() -> Iterator[None]:
    """What `torch.empty_like` and `Tensor.new_empty` make inside is surrounded by NaN, and must be at the end."""
    made: list[Tensor] = []
    empty_like, new_empty = torch.empty_like, Tensor.new_empty

    def around(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        made.append(surrounded(torch.full(x.shape, torch.nan, dtype=x.dtype)))
        return made[-1]

    def patched_empty_like(*args: Any, **kwargs: Any) -> Tensor:
        return around(empty_like(*args, **kwargs))

    def patched_new_empty(*args: Any, **kwargs: Any) -> Tensor:
        return around(new_empty(*args, **kwargs))

    with (
        mock.patch.object(torch, "empty_like", patched_empty_like),
        mock.patch.object(Tensor, "new_empty", patched_new_empty),
    ):
        yield
    for x in made:
        # Of the whole storage: the interpreter's view of an argument may be some columns of it.
        whole = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).float()
        outside = torch.cat([whole[:MARGIN], whole[-MARGIN:]])
        assert bool(torch.isnan(outside).all()), f"written outside of an output of shape {list(x.shape)}"
