"""What a model must beat: gzip, xz, a unigram and a bigram, in bits per byte of the held-out text.

Bits per byte do not depend on the tokenizer, so a language model, a compressor and a table of counts can
be read on one scale: lower is better. Compressors see all held-out documents as one stream, which favours
them (they may look back over every earlier document); the count models see the training tokens only.

Everything streams: memory is bounded by the compressors' windows (xz -9: up to 674 MiB for data of 64 MiB
or more, proportionally less below) and by ``max_train_tokens`` counts, however large the files are.
"""

from __future__ import annotations

import lzma
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalite.config import DatasetSpec
from megalite.data.dataset import open_prepared
from megalite.errors import UserError

Tokens = NDArray[np.integer[Any]]
"""One-dimensional token ids of any integer dtype; a memory map is read piece by piece."""

BLOCK_TOKENS = 1 << 16
"""Contiguous tokens read at a time when a large training set is sampled."""

PENDING_PAIRS = 1 << 21
"""Pairs collected before they are sorted into the counts: bounds the memory of sorting to some 100 MB."""


@dataclass(frozen=True, slots=True)
class Document:
    """One held-out document."""

    source: str
    raw: bytes
    """Its text as UTF-8."""
    tokens: Tokens
    """Its token ids, without the end-of-document token."""


@dataclass(frozen=True, slots=True)
class CompressedSize:
    """Sizes of one byte stream, in bytes: as it is, and as ``gzip -9`` and ``xz -9`` write it."""

    raw: int
    gzip: int
    xz: int

    @property
    def gzip_bits_per_byte(self) -> float:
        """Compressed bits for each raw byte; nan for an empty stream."""
        return 8 * self.gzip / self.raw if self.raw else math.nan

    @property
    def xz_bits_per_byte(self) -> float:
        """Compressed bits for each raw byte; nan for an empty stream."""
        return 8 * self.xz / self.raw if self.raw else math.nan


def compressed_size(chunks: Iterable[bytes]) -> CompressedSize:
    """Size of all `chunks` compressed as one stream by gzip -9 and xz -9, headers and checksums included."""
    gzip = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)  # 16: gzip framing rather than zlib's
    xz = lzma.LZMACompressor(format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9)
    raw = gzip_bytes = xz_bytes = 0
    for chunk in chunks:
        raw += len(chunk)
        gzip_bytes += len(gzip.compress(chunk))
        xz_bytes += len(xz.compress(chunk))
    return CompressedSize(raw, gzip_bytes + len(gzip.flush()), xz_bytes + len(xz.flush()))


@dataclass(frozen=True, slots=True)
class CountModel:
    """Unigram and Witten-Bell bigram probabilities from counted training tokens.

    Unigram:  p(b)     = (c(b) + k) / (N + k V)                            add-k, k = 0.5
    Bigram:   p(b | a) = (c(a, b) + t(a) p(b)) / (c(a) + t(a))             t(a): distinct successors of a
    A context that was never seen falls back to the unigram.

    Source: Witten & Bell, The zero-frequency problem, IEEE Trans. Inf. Theory 37(4), 1991 (method C).
    """

    unigram: NDArray[np.float64]
    """[V] probabilities, summing to one."""
    pairs: NDArray[np.int64]
    """[P] keys a * V + b of the distinct pairs, sorted."""
    pair_counts: NDArray[np.int64]
    """[P] how often each was seen."""
    context_counts: NDArray[np.int64]
    """[V] how often a was followed by anything."""
    context_types: NDArray[np.int64]
    """[V] how many different tokens followed a."""

    def unigram_bits(self, tokens: Tokens) -> float:
        """Bits to encode `tokens` [n], each on its own."""
        return float(-np.log2(self.unigram[tokens]).sum())

    def bigram_bits(self, previous: Tokens, tokens: Tokens) -> float:
        """Bits to encode `tokens` [n], each after its `previous` [n]."""
        context = previous.astype(np.int64)
        key = context * self.unigram.size + tokens
        if self.pairs.size:
            place = np.minimum(np.searchsorted(self.pairs, key), self.pairs.size - 1)
            seen = np.where(self.pairs[place] == key, self.pair_counts[place], 0)
        else:
            seen = np.zeros_like(key)
        types = self.context_types[context]
        total = self.context_counts[context] + types
        fallback = self.unigram[tokens]
        with np.errstate(invalid="ignore"):
            interpolated = (seen + types * fallback) / total
        return float(-np.log2(np.where(total > 0, interpolated, fallback)).sum())


def count_tokens(blocks: Iterable[Tokens], vocab_size: int, *, add: float = 0.5) -> CountModel:
    """Count single tokens and adjacent pairs within each contiguous block.

    Args:
        blocks: runs of token ids, each contiguous in the training text; no pair is counted across two.
        vocab_size: V; every id must lie in [0, V).
        add: the k of add-k smoothing of the unigram, greater than 0.

    Raises:
        UserError: an id outside the vocabulary, or no tokens at all.
    """
    singles = np.zeros(vocab_size, dtype=np.int64)
    pairs = pair_counts = np.empty(0, dtype=np.int64)
    pending: list[NDArray[np.int64]] = []
    for block in blocks:
        ids = np.asarray(block).astype(np.int64)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            worst = int(ids.max()) if ids.max() >= vocab_size else int(ids.min())
            raise UserError(
                f"training token {worst} is outside the vocabulary of {vocab_size}: "
                "the data was prepared with another tokenizer"
            )
        singles += np.bincount(ids, minlength=vocab_size)
        pending.append(ids[:-1] * vocab_size + ids[1:])
        if sum(keys.size for keys in pending) >= PENDING_PAIRS:
            pairs, pair_counts = _merge_counts(pairs, pair_counts, pending)
            pending = []
    if not singles.sum():
        raise UserError("the training split holds no tokens: nothing to count a unigram from")
    pairs, pair_counts = _merge_counts(pairs, pair_counts, pending)
    context = pairs // vocab_size
    context_counts = np.zeros(vocab_size, dtype=np.int64)
    np.add.at(context_counts, context, pair_counts)
    return CountModel(
        unigram=(singles + add) / (singles.sum() + add * vocab_size),
        pairs=pairs,
        pair_counts=pair_counts,
        context_counts=context_counts,
        context_types=np.bincount(context, minlength=vocab_size),
    )


def _merge_counts(
    pairs: NDArray[np.int64], counts: NDArray[np.int64], pending: list[NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorted distinct keys [P] and their counts [P], with the keys of `pending` counted in."""
    keys, fresh = np.unique(np.concatenate(pending or [pairs[:0]]), return_counts=True)
    place = np.searchsorted(pairs, keys)
    known = np.zeros(keys.size, dtype=np.bool_)
    inside = place < pairs.size
    known[inside] = pairs[place[inside]] == keys[inside]
    counts[place[known]] += fresh[known]
    new = ~known
    return np.insert(pairs, place[new], keys[new]), np.insert(counts, place[new], fresh[new])


def spread_blocks(streams: Sequence[Tokens], max_tokens: int, block: int = BLOCK_TOKENS) -> Iterator[Tokens]:
    """All of `streams` in blocks if they hold at most `max_tokens`, else evenly spaced blocks of that sum.

    Evenly spaced, because a file's beginning is often one source or one date and not the whole of it.
    The one pair that straddles two blocks is not counted: a 65,536th of them.
    """
    total = sum(len(stream) for stream in streams)
    for stream in streams:
        if total <= max_tokens:
            for start in range(0, len(stream), block):
                yield np.asarray(stream[start : start + block])
            continue
        share = max(1, round(max_tokens * len(stream) / total / block))
        starts = np.linspace(0, max(0, len(stream) - block), share).astype(np.int64)
        for start in starts:
            yield np.asarray(stream[start : start + block])


def measure(
    documents: Callable[[], Iterable[Document]],
    training: Sequence[Tokens],
    *,
    vocab_size: int,
    eod_id: int,
    max_train_tokens: int = 1 << 23,
) -> dict[str, Any]:
    """Baselines of held-out `documents`, as written to ``baselines.json``.

    The count models score what a model scores: each document's tokens and the end-of-document token after
    them, the first one in the context of the end-of-document token before.

    Args:
        documents: gives a fresh pass over the held-out documents at each call: one pass over all, and one
            more for each source where there are several, so that one compressor is in memory at a time.
        training: token streams of the training split, one for each dataset.
        vocab_size: V, the true vocabulary.
        eod_id: the end-of-document token.
        max_train_tokens: most training tokens counted; more are sampled in evenly spaced blocks.

    Raises:
        UserError: no held-out bytes, or tokens outside the vocabulary.
    """
    started = time.perf_counter()
    counts = count_tokens(spread_blocks(training, max_train_tokens), vocab_size)
    unigram = bigram = 0.0
    scored = 0
    sources: set[str] = set()

    def all_bytes() -> Iterator[bytes]:
        nonlocal unigram, bigram, scored
        for document in documents():
            labels = np.append(np.asarray(document.tokens).astype(np.int64), eod_id)
            unigram += counts.unigram_bits(labels)
            bigram += counts.bigram_bits(np.concatenate(([eod_id], labels[:-1])), labels)
            scored += labels.size
            sources.add(document.source)
            yield document.raw

    whole = compressed_size(all_bytes())
    if whole.raw == 0:
        raise UserError("no held-out bytes to compress: prepare the data with a larger validation split")
    return {
        "gzip_bits_per_byte": whole.gzip_bits_per_byte,
        "xz_bits_per_byte": whole.xz_bits_per_byte,
        "unigram_bits_per_byte": unigram / whole.raw,
        "bigram_bits_per_byte": bigram / whole.raw,
        "val_bytes": whole.raw,
        "val_tokens": scored,
        "counted_train_tokens": min(max_train_tokens, sum(len(stream) for stream in training)),
        "sources": {
            name: _source_baselines(whole if len(sources) == 1 else _size_of(documents(), name))
            for name in sorted(sources)
        },
        "seconds": time.perf_counter() - started,
    }


def _size_of(documents: Iterable[Document], source: str) -> CompressedSize:
    return compressed_size(document.raw for document in documents if document.source == source)


def _source_baselines(size: CompressedSize) -> dict[str, float]:
    return {
        "gzip_bits_per_byte": size.gzip_bits_per_byte,
        "xz_bits_per_byte": size.xz_bits_per_byte,
        "bytes": size.raw,
    }


def compute_baselines(
    datasets: Sequence[str | os.PathLike[str] | DatasetSpec], *, max_train_tokens: int = 1 << 23
) -> dict[str, Any]:
    """`measure` on prepared dataset folders; xz takes about a second for 2 MB of held-out text.

    Sources have the names that validations give them, so that the two can be set side by side.

    Raises:
        UserError: a folder is not a prepared dataset, or holds no held-out text.
    """
    from megalite.data.validation import ValidationSet  # imports torch; counting does without it

    specs = [
        item if isinstance(item, DatasetSpec) else DatasetSpec(path=os.fspath(item)) for item in datasets
    ]
    folders = open_prepared(specs)
    readers = [folder.reader("validation") for folder in folders]
    names = iter(ValidationSet(folders).sources)
    names_of = [[next(names) for _ in folder.sources] for folder in folders]

    def documents() -> Iterator[Document]:
        for folder, reader, sources in zip(folders, readers, names_of, strict=True):
            tokenizer, records = folder.tokenizer(), folder.documents("validation")
            for number in range(reader.documents):
                tokens = reader.document(number)
                if tokens.size and int(tokens[-1]) == folder.eod_id:
                    tokens = tokens[:-1]
                source = sources[int(records["source"][number])]
                yield Document(source, tokenizer.decode(tokens).encode("utf-8"), tokens)

    return measure(
        documents,
        [folder.reader("train").stream for folder in folders],
        vocab_size=folders[0].vocab_size,
        eod_id=folders[0].eod_id,
        max_train_tokens=max_train_tokens,
    )
