"""Held-out documents, cut into windows that score every token exactly once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megalite.config import IGNORE_INDEX, DatasetSpec
from megalite.data.dataset import PreparedDataset, TokenStream, open_prepared
from megalite.data.loader import MicroBatch, pack
from megalite.data.order import Permutation, key
from megalite.errors import UserError

SUBSET_KEY = 0x5AB5E7
"""Fixed, so that a truncated validation scores the same documents in every run."""


@dataclass(frozen=True, slots=True)
class ValWindow:
    """Up to seq_length consecutive inputs of one document."""

    tokens: npt.NDArray[np.int64]
    """[n]; the document's first window starts with the end-of-document token."""
    labels: npt.NDArray[np.int64]
    """[n]: the next token; IGNORE_INDEX where an earlier window scored it."""
    positions: npt.NDArray[np.int64]
    """[n]: 0 … n - 1."""
    source: int
    """Index into `ValidationSet.sources`."""


@dataclass(frozen=True, slots=True)
class ValSelection:
    """Which documents a validation scores, and what they amount to."""

    documents: npt.NDArray[np.int64]
    """[documents, 2]: dataset and document number, in scoring order."""
    tokens: npt.NDArray[np.int64]
    """[sources]: scored tokens of each source, end-of-document tokens included."""
    bytes: npt.NDArray[np.int64]
    """[sources]: UTF-8 bytes of each source's text."""
    complete: bool
    """True if these are all documents."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A window that has not been read yet: inputs [start, stop) of a document, scored from `scored` on."""

    dataset: int
    document: int
    start: int
    stop: int
    scored: int


class ValidationSet:
    """The validation documents of one or several prepared datasets.

    A document's inputs are [EOD] + tokens, its labels tokens + [EOD] (the stored document ends in EOD), so
    each of its tokens, the closing EOD included, is predicted exactly once and from that document alone.

    Args:
        prepared: folders; their tokenizers must be equal (`load_validation` checks it).
    """

    def __init__(self, prepared: Sequence[PreparedDataset]) -> None:
        self._prepared = list(prepared)
        self._streams = [
            TokenStream(folder.reader("validation"), eod_id=folder.eod_id, vocab_size=folder.vocab_size)
            for folder in prepared
        ]
        self._records = [folder.documents("validation") for folder in prepared]
        names = [name for folder in prepared for name in folder.sources]
        self.sources = [
            name if names.count(name) == 1 else f"{folder.path.name}/{name}"
            for folder in prepared
            for name in folder.sources
        ]
        """Names of all sources; a name used by several datasets gets its folder's name in front."""
        counts = [len(folder.sources) for folder in prepared]
        self._source_base = np.cumsum(counts) - np.array(counts)
        whole = self.select(None)
        self.tokens_per_source, self.bytes_per_source = whole.tokens, whole.bytes
        self.tokens = int(whole.tokens.sum())
        """Scored tokens of all documents, end-of-document tokens included."""
        self.bytes = int(whole.bytes.sum())
        """UTF-8 bytes of all documents."""

    def __len__(self) -> int:
        """Number of documents."""
        return sum(stream.reader.documents for stream in self._streams)

    def select(self, max_tokens: int | None = None) -> ValSelection:
        """All documents, or a fixed pseudo-random subset of whole documents of at most `max_tokens` tokens.

        The subset is a prefix of one fixed permutation, at least one document long; it never depends on the
        run.
        """
        pairs = [(d, i) for d, stream in enumerate(self._streams) for i in range(stream.reader.documents)]
        complete = True
        if max_tokens is not None and pairs:
            order = Permutation(len(pairs), key(SUBSET_KEY))
            chosen: list[tuple[int, int]] = []
            total = 0
            for dataset, document in (pairs[order(n)] for n in range(len(pairs))):
                total += self._length(dataset, document)
                if total > max_tokens and chosen:
                    break
                chosen.append((dataset, document))
            complete, pairs = len(chosen) == len(pairs), chosen
        tokens = np.zeros(len(self.sources), dtype=np.int64)
        size = np.zeros(len(self.sources), dtype=np.int64)
        for dataset, document in pairs:
            source = self._source(dataset, document)
            tokens[source] += self._length(dataset, document)
            size[source] += int(self._records[dataset]["bytes"][document])
        documents = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        return ValSelection(documents=documents, tokens=tokens, bytes=size, complete=complete)

    def windows(
        self, seq_length: int, overlap: float = 0.5, *, selection: ValSelection | None = None
    ) -> Iterator[ValWindow]:
        """Windows of at most `seq_length` inputs over the selected documents (all by default).

        Consecutive windows of a document share ⌊seq_length · overlap⌋ inputs, whose labels only the earlier
        window scores.
        """
        for piece in self._pieces(seq_length, overlap, selection):
            yield self._read(piece)

    def micro_batches(
        self,
        seq_length: int,
        overlap: float = 0.5,
        *,
        tokens_per_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        selection: ValSelection | None = None,
        max_tokens: int | None = None,
    ) -> Iterator[tuple[MicroBatch, npt.NDArray[np.int64]]]:
        """This rank's batches of packed windows, each with the source of every segment [segments].

        Batch b belongs to rank b mod dp_size; the batches themselves are the same for every dp_size.

        Args:
            seq_length: inputs per window.
            overlap: share of a window that repeats earlier inputs as context, in [0, 1).
            tokens_per_batch: most tokens of a batch, at least seq_length.
            selection: documents to score; `max_tokens` selects a subset instead; neither scores all.
        """
        if tokens_per_batch < seq_length:
            raise UserError(f"tokens_per_batch={tokens_per_batch} must be at least seq_length={seq_length}")
        if selection is None and max_tokens is not None:
            selection = self.select(max_tokens)
        batches = _filled(self._pieces(seq_length, overlap, selection), tokens_per_batch)
        for number, pieces in enumerate(batches):
            if number % dp_size != dp_rank:
                continue
            windows = [self._read(piece) for piece in pieces]
            batch = pack(
                [w.tokens for w in windows],
                [w.labels for w in windows],
                [np.zeros(1, np.int64)] * len(windows),
            )
            yield batch, np.array([w.source for w in windows], dtype=np.int64)

    def texts(self, selection: ValSelection | None = None) -> Iterator[tuple[int, str]]:
        """(source, decoded text) of the selected documents, for compressors and n-gram baselines.

        Raises:
            UserError: the stored tokenizer is not the one the data was encoded with.
        """
        tokenizers = [folder.tokenizer() for folder in self._prepared]
        for dataset, document in (self.select() if selection is None else selection).documents:
            tokens = self._streams[dataset].reader.document(int(document))
            yield (
                self._source(dataset, document),
                tokenizers[dataset].decode(self._without_eod(dataset, tokens)),
            )

    def _without_eod(self, dataset: int, tokens: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        closed = tokens.size and int(tokens[-1]) == self._streams[dataset].eod_id
        return tokens[:-1] if closed else tokens

    def _source(self, dataset: int, document: int) -> int:
        return int(self._source_base[dataset]) + int(self._records[dataset]["source"][document])

    def _length(self, dataset: int, document: int) -> int:
        """Scored tokens of a document: as many as it stores."""
        reader = self._streams[dataset].reader
        return reader.document_start(document + 1) - reader.document_start(document)

    def _pieces(self, seq_length: int, overlap: float, selection: ValSelection | None) -> Iterator[_Piece]:
        if seq_length < 1:
            raise UserError(f"seq_length={seq_length} must be at least 1")
        if not 0.0 <= overlap < 1.0:
            raise UserError(f"eval.overlap={overlap} must be in [0, 1)")
        context = int(seq_length * overlap)
        for dataset, document in (self.select() if selection is None else selection).documents.tolist():
            length, start, scored = self._length(dataset, document), 0, 0
            while scored < length:
                stop = min(start + seq_length, length)
                yield _Piece(dataset, document, start, stop, scored)
                scored, start = stop, stop - context

    def _read(self, piece: _Piece) -> ValWindow:
        stream = self._streams[piece.dataset]
        base = stream.reader.document_start(piece.document)
        labels = stream.read(base + piece.start, piece.stop - piece.start)
        tokens = np.empty_like(labels)
        tokens[1:] = labels[:-1]
        tokens[0] = stream.eod_id if piece.start == 0 else stream.read(base + piece.start - 1, 1)[0]
        labels[: piece.scored - piece.start] = IGNORE_INDEX
        return ValWindow(
            tokens=tokens,
            labels=labels,
            positions=np.arange(labels.size, dtype=np.int64),
            source=self._source(piece.dataset, piece.document),
        )


def load_validation(specs: Sequence[DatasetSpec]) -> ValidationSet:
    """The validation documents of a blend's folders.

    Raises:
        UserError: see `open_prepared`.
    """
    return ValidationSet(open_prepared(specs))


def _filled(pieces: Iterator[_Piece], tokens_per_batch: int) -> Iterator[list[_Piece]]:
    """Consecutive windows grouped so that each group has at most `tokens_per_batch` tokens."""
    group: list[_Piece] = []
    size = 0
    for piece in pieces:
        length = piece.stop - piece.start
        if group and size + length > tokens_per_batch:
            yield group
            group, size = [], 0
        group.append(piece)
        size += length
    if group:
        yield group
