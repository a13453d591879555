"""Boxes of the model's tensors as blocks of the files' tensors, and whether blocks make up a whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.interop.tensor_file import MAX_FILE_BYTES, Entry, TensorFile, plan_files
from megalite.models.families import HfTensor
from megalite.parallel.state import Kind, ModelState
from megalite_kernels.reference.adamw import join

KIND_FILES: dict[Kind, str] = {
    "master": "weights/model",
    "exp_avg": "optimizer/exp_avg",
    "exp_avg_sq": "optimizer/exp_avg_sq",
}
"""What a checkpoint holds of each tensor, and where."""


@dataclass(frozen=True, slots=True)
class Block:
    """A box of this process, as it lies in a tensor of a file."""

    key: str
    """Kind and name of the file's tensor: ``exp_avg/model.norm.weight``."""
    whole: tuple[int, ...]
    """Shape of that tensor."""
    offset: tuple[int, ...]
    live: Tensor
    """A view of the live state, transposed where the file is."""
    second: bool
    """Another pipeline stage holds the same values and saves them."""
    remainder: Tensor | None = None
    """What completes `live` to the values, as in `Box`; transposed too."""

    @property
    def values(self) -> Tensor:
        """What the file holds: the live values, or a copy made of the two parts of masters."""
        return self.live if self.remainder is None else join(self.live, self.remainder)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.live.dtype if self.remainder is None else torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the block."""
        return tuple(self.live.shape)


def blocks_of(state: ModelState, hf_tensors: Iterable[HfTensor], *, tied_rank: int = 0) -> Iterator[Block]:
    """Every box of weights and moments that this process updates, where it lies in the files.

    Args:
        state: the live state.
        hf_tensors: the family's map from pieces to files' tensors.
        tied_rank: this process's place among the stages that share a tied weight; the first one saves it.
    """
    places = {part.piece: (tensor, part) for tensor in hf_tensors for part in tensor.parts}
    for kind in KIND_FILES:
        for box in state.boxes(kind):
            tensor, part = places[box.piece.name]
            turned = box.offset[::-1] if part.transpose else box.offset
            yield Block(
                key=f"{kind}/{tensor.name}",
                whole=tensor.shape,
                offset=tuple(a + b for a, b in zip(part.offset, turned, strict=True)),
                live=_in_file(box.live, part.transpose),
                remainder=None if box.remainder is None else _in_file(box.remainder, part.transpose),
                second=box.piece.tied and tied_rank > 0,
            )


def _in_file(tensor: Tensor, transpose: bool) -> Tensor:
    return tensor.detach().t() if transpose else tensor.detach()


def split_key(key: str) -> tuple[str, str]:
    """Kind and tensor name of a block's key."""
    kind, _, name = key.partition("/")
    return kind, name


def files_of(
    hf_tensors: Sequence[HfTensor], kind: Kind, dtype: torch.dtype, *, max_bytes: int = MAX_FILE_BYTES
) -> list[TensorFile]:
    """The files that hold one kind of state."""
    entries = [Entry(t.name, t.shape, dtype) for t in hf_tensors]
    return plan_files(entries, KIND_FILES[kind], max_bytes=max_bytes)


Extent = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and shape of a block."""


def makes_up(whole: Sequence[int], blocks: Iterable[Extent]) -> bool:
    """Whether blocks hold every element of a tensor exactly once: their sizes add up, and no two overlap."""
    left = sorted(block for block in blocks if 0 not in block[1])
    if sum(math.prod(shape) for _, shape in left) != math.prod(whole):
        return False
    if any(o < 0 or o + n > size for block in left for o, n, size in zip(*block, whole, strict=True)):
        return False
    active: list[Extent] = []  # sorted by first row: only those that reach into the next one can meet it
    for block in left:
        active = [other for other in active if _overlap(other[0][:1], other[1][:1], block[0][:1], (1,))]
        if any(_overlap(*block, *other) for other in active):
            return False
        active.append(block)
    return True


def _overlap(
    offset: Sequence[int], shape: Sequence[int], other_offset: Sequence[int], other_shape: Sequence[int]
) -> bool:
    sides = zip(offset, shape, other_offset, other_shape, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in sides)
