"""Pieces: what each parameter holds, in the words of the whole model.

A local parameter may fuse several projections (q, k and v in one matrix), be one shard of a tensor, or be
padded. None of that is visible outside the process: checkpoints, initialisation and weight decay speak of
*pieces*, each a canonical name with its global shape and the place of the local part in it. Every element
of every parameter belongs to exactly one piece; vocabulary padding rows belong to none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from megalite_kernels.reference.adamw import join, split

CHUNK = 1 << 20
"""Elements of which masters are taken apart at a time."""
TensorParallel = Literal["sharded", "replicated", "partial"]


@dataclass(frozen=True, slots=True)
class Init:
    """How a piece starts: normal with standard deviation `std`, all ones or all zeros."""

    kind: Literal["normal", "ones", "zeros"]
    std: float = 0.0

    @classmethod
    def normal(cls, std: float) -> Init:
        """Mean 0, standard deviation `std`."""
        return cls("normal", std)

    @classmethod
    def ones(cls) -> Init:
        """Every element 1."""
        return cls("ones")

    @classmethod
    def zeros(cls) -> Init:
        """Every element 0."""
        return cls("zeros")


@dataclass(frozen=True, slots=True)
class Piece:
    """One canonical tensor, or the part of it that a local parameter holds."""

    name: str
    """Canonical global name, for example ``layers.3.attention.q_proj.weight``."""
    global_shape: tuple[int, ...]
    """True shape of the whole tensor: no padding, no sharding."""
    offset: tuple[int, ...]
    """Where the local part starts in the global tensor; zeros without tensor parallelism."""
    rows: tuple[int, int]
    """[start, stop) along dim 0 of the local parameter that holds the part."""
    tp: TensorParallel
    """Its gradient under tensor parallelism: of a shard, equal on all ranks, or to be summed over them."""
    init: Init
    decay: bool
    """Weight decay applies: matrices and embeddings yes; norms and biases no."""
    tied: bool = False
    """Another pipeline stage holds a copy (tied embeddings): gradients are summed over the two."""


@dataclass(frozen=True, slots=True)
class Box:
    """A block of a canonical tensor that this process is responsible for."""

    piece: Piece
    offset: tuple[int, ...]
    """Where the block starts in the whole tensor."""
    live: Tensor
    """Its values, of the block's shape: a view of the live state. With a remainder the bf16 part of them."""
    remainder: Tensor | None = None
    """int16 that complete `live` to fp32 masters (`megalite_kernels.reference.adamw`), a view too."""

    @property
    def tensor(self) -> Tensor:
        """Its values: the live ones, or with a remainder a copy, which to write changes nothing."""
        return self.live if self.remainder is None else join(self.live, self.remainder)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.live.dtype if self.remainder is None else torch.float32

    @property
    def index(self) -> tuple[slice, ...]:
        """The block's place in the whole tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.live.shape, strict=True))


def write_values(live: Tensor, remainder: Tensor | None, values: Tensor) -> None:
    """Set (a part of) a box: its live tensor, or with a remainder both parts of the values."""
    if remainder is None:
        live.copy_(values)
        return
    rows = max(1, CHUNK // max(1, math.prod(live.shape[1:])))
    for part, rest, chunk in zip(live.split(rows), remainder.split(rows), values.split(rows), strict=True):
        high, low = split(chunk.to(live.device, torch.float32))
        part.copy_(high)
        rest.copy_(low)


def boxes_of_range(
    piece: Piece, local_shape: tuple[int, ...], flat: Tensor, start: int, remainder: Tensor | None = None
) -> Iterator[Box]:
    """The blocks that a run of a piece's elements, in memory order, consists of.

    A run may begin and end inside a row: it is the rest of a row, whole rows and the beginning of a row.

    Args:
        piece: what the run is of.
        local_shape: shape of the local part of the piece.
        flat: [n] the elements.
        start: number of the first of them within the local part.
        remainder: [n] as in `Box`.
    """
    end, width = start + flat.numel(), math.prod(local_shape[1:])
    while start < end:
        row, column = divmod(start, width)
        shape: tuple[int, ...]
        offset: tuple[int, ...]
        if len(local_shape) == 1:
            stop, shape, offset = end, (end - start,), (start,)
        elif column == 0 and end - start >= width:
            rows = (end - start) // width
            stop, shape, offset = start + rows * width, (rows, *local_shape[1:]), (row, 0)
        else:
            stop = min(end, (row + 1) * width)
            shape, offset = (1, stop - start), (row, column)
        place = tuple(a + b for a, b in zip(piece.offset, offset, strict=True))
        count = stop - start
        low = None if remainder is None else remainder[:count].view(shape)
        yield Box(piece, place, flat[:count].view(shape), low)
        flat, start = flat[count:], stop
        remainder = None if remainder is None else remainder[count:]


@runtime_checkable
class HasPieces(Protocol):
    """A module that owns parameters directly declares what they hold."""

    def declare_pieces(self, path: str) -> Iterator[tuple[str, Piece]]:
        """Yield (parameter's name in this module, piece); `path` is the module's place in the model."""
        ...


def whole(
    name: str, shape: tuple[int, ...], init: Init, *, tp: TensorParallel, decay: bool, first_row: int = 0
) -> Piece:
    """A piece whose tensor lies complete in rows [first_row, first_row + shape[0]) of the parameter."""
    return Piece(name, shape, (0,) * len(shape), (first_row, first_row + shape[0]), tp, init, decay)


def iter_pieces(model: nn.Module) -> Iterator[tuple[nn.Parameter, str, Piece]]:
    """Yield (parameter, its own dotted name in `model`, piece) for everything the model holds.

    The order is that of `model.named_modules()`, the same in every process. A parameter shared by two
    modules is yielded once.

    Raises:
        ValueError: a module owns a parameter that it declares no piece for.
    """
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        own = {name: p for name, p in module.named_parameters(recurse=False) if p not in seen}
        if not own:
            continue
        seen.update(own.values())
        declared = list(module.declare_pieces(path)) if isinstance(module, HasPieces) else []
        missing = own.keys() - {name for name, _ in declared}
        if missing:
            raise ValueError(
                f"parameters {sorted(missing)} of {path or 'the model'} ({type(module).__name__}) belong to "
                "no piece: yield one for each from the module's declare_pieces"
            )
        for name, piece in declared:
            if name in own:
                yield own[name], f"{path}.{name}" if path else name, piece


def piece_view(parameter: Tensor, piece: Piece) -> Tensor:
    """The rows of `parameter` (or of a tensor laid out like it) that hold `piece`; shares its memory."""
    return parameter[piece.rows[0] : piece.rows[1]]
