"""What the launchers of the CUDA attention kernels make of an op's arguments: sizes, strides, masks, logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
FAR = 1 << 29
"""Stands for no limit of how far a query sees; as in attention_common.cuh."""
SECTION_BYTES = 16 << 20
"""Of the operands that blocks running at one time may reread: a share of the L2 cache, which holds 40 MB on an A100,
50 MB on an H100 and 126 MB on a B200."""


class Logits(NamedTuple):
    """Base-2 logits are `factor * bent`: bent is tanh(before * s) if capped, else before * s of the scores s."""

    before: float
    factor: float
    capped: int


class Mask(NamedTuple):
    """Query i sees keys from i + shift - behind to i + shift + ahead, shift = keys - queries + offset."""

    behind: int
    ahead: int
    offset: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one call; a dense batch entry and a packed document are both a sequence."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    dim: int
    sequences: int
    longest_query: int
    longest_key: int

    @property
    def groups(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def statistics(self) -> tuple[int, ...]:
        """[batch, heads, queries]: of one number per row."""
        return self.batch, self.heads, self.queries

    def section(self, rows: int, row_bytes: int) -> int:
        """Pairs of key head and sequence whose `rows` of `row_bytes` fit the L2 cache together."""
        return max(1, SECTION_BYTES // max(1, rows * row_bytes))


def shape_of(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> Shape:
    """The sizes, without a look at the contents of cu_seqlens."""
    queries, heads, dim = q.shape[-3:]
    keys, kv_heads = k.shape[-3:-1]
    batch = q.shape[0] if q.dim() == 4 else 1
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    bound = max_seqlen if cu_seqlens is not None and max_seqlen > 0 else max(queries, keys)
    longest = (min(queries, bound), min(keys, bound))
    return Shape(batch, queries, keys, heads, kv_heads, dim, sequences, *longest)


def rows_of(x: Tensor) -> Tensor:
    """x, with every row's features next to one another and on 16 bytes."""
    even = all(
        stride % 8 == 0 or size <= 1 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)
    )
    fits = x.stride(-1) == 1 and even and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """In elements, of batch entry, token and head."""
    return (x.stride(0) if x.dim() == 4 else 0, x.stride(-3), x.stride(-2))


def mask_of(causal: bool, window: int, offset: int) -> Mask:
    """How far a query sees back and ahead."""
    reach = window - 1 if 0 < window <= FAR else FAR
    return Mask(reach, 0 if causal else reach, offset)


def logits_of(softcap: float, scale: float) -> Logits:
    """A scale that is no positive number can't be the factor: max(s) * f = max(s * f) holds for f > 0 only."""
    if softcap > 0:
        return Logits(scale / softcap, softcap * math.log2(math.e), 1)
    if scale > 0:
        return Logits(1.0, scale * math.log2(math.e), 0)
    return Logits(scale * math.log2(math.e), 1.0, 0)


def bounds_of(cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Where documents start in the queries and in the keys, as arrays without gaps."""
    if cu_seqlens is None:
        return None, None
    keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    return cu_seqlens.contiguous(), keys.contiguous()
