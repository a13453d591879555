"""How much of what a model writes is repetition, and how much is copied from its training text.

The longest n-gram shared with the training tokens is found by binary search over n (if an n-gram is
shared, so is each shorter one inside it). Each probe streams over the training tokens once: polynomial
hashes of all windows from one prefix sum, modulo 2**64,

    P[i] = sum_{k < i} code(t[k]) * B**k        hash(i, n) = (P[i + n] - P[i]) * B**-i

filtered by a bitmap and by the sorted hashes of the samples; every hit is compared token by token, so a
collision of hashes can never be reported. Memory is a few tens of megabytes whatever the file's size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megalite.config import DatasetSpec
from megalite.errors import UserError

if TYPE_CHECKING:
    from megalite.data.validation import ValidationSet
    from megalite.train.report_records import RunRecords

Tokens = NDArray[np.integer[Any]]
"""One-dimensional token ids of any integer dtype; a memory map is read piece by piece."""

CHUNK_TOKENS = 1 << 20
"""Window starts hashed at a time (8 bytes each, a handful of arrays)."""

BITMAP_BITS = 20
"""The filter before the exact look-up has 2**this entries: one in a hundred passes for 10,000 windows."""

_BASE = np.uint64(0x9E3779B97F4A7C15)
"""B: odd, so that it has an inverse modulo 2**64."""
_INVERSE_BASE = np.uint64(pow(int(_BASE), -1, 1 << 64))


def repetition_rate(tokens: Tokens, n: int = 4) -> float:
    """Share of n-grams of `tokens` that occurred earlier in it: 1 - distinct / all; nan below n tokens."""
    return 1.0 - distinct_n(tokens, n)


def distinct_n(tokens: Tokens, n: int) -> float:
    """Distinct n-grams ÷ all n-grams of `tokens` (Li et al., arXiv 1510.03055); nan below n tokens."""
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    if len(tokens) < n:
        return float("nan")
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), n)
    return len(np.unique(windows, axis=0)) / len(windows)


@dataclass(frozen=True, slots=True)
class SharedRun:
    """The longest run of tokens that a sample has in common with the training text."""

    length: int
    """Tokens; 0 if not even one is shared."""
    sample: int = -1
    """Which sample holds it."""
    sample_start: int = -1
    """Its first token's place in that sample."""
    stream: int = -1
    """Which training stream holds it."""
    stream_start: int = -1
    """Its first token's place in that stream."""


def longest_shared_run(samples: Sequence[Tokens], training: Sequence[Tokens]) -> SharedRun:
    """Longest n-gram of any of `samples` that occurs word for word in `training`.

    Args:
        samples: token ids of each generated text.
        training: token streams; each is read about log2(longest sample) times.

    Returns:
        The run and where it stands; length 0 where nothing is shared.
    """
    texts = [np.ascontiguousarray(sample).astype(np.int64) for sample in samples]
    low, high = 0, max((len(text) for text in texts), default=0)
    best = SharedRun(0)
    while low < high:
        n = (low + high + 1) // 2
        found = _find_shared(texts, training, n)
        if found is None:
            high = n - 1
        else:
            low, best = n, found
    return best


def tokens_seen(blocks: Iterable[Tokens], vocab_size: int) -> NDArray[np.bool_]:
    """[V] which token ids occur in any of `blocks`."""
    seen = np.zeros(vocab_size, dtype=np.bool_)
    for block in blocks:
        seen[np.asarray(block)] = True
    return seen


def spread_pieces(streams: Sequence[Tokens], max_tokens: int, piece: int = CHUNK_TOKENS) -> list[Tokens]:
    """`streams` themselves if they hold at most `max_tokens`, else evenly spaced pieces of about that sum."""
    total = sum(len(stream) for stream in streams)
    if total <= max_tokens:
        return list(streams)
    pieces: list[Tokens] = []
    for stream in streams:
        share = max(1, round(max_tokens * len(stream) / total / piece))
        starts = np.linspace(0, max(0, len(stream) - piece), share).astype(np.int64)
        pieces += [stream[start : start + piece] for start in starts]
    return pieces


# --- of a run ---------------------------------------------------------------------------------------


def analyse_samples(
    samples: Sequence[Tokens],
    training: Sequence[Tokens],
    held_out: Sequence[Tokens],
    *,
    vocab_size: int,
    max_scan_tokens: int = 1 << 26,
) -> dict[str, Any]:
    """What ``overlap.json`` says about sampled texts.

    Args:
        samples: token ids of the texts, prompts excluded.
        training: token streams of the training split.
        held_out: pieces of unseen text as long as the samples: what overlap and repetition are natural.
        vocab_size: V.
        max_scan_tokens: most training tokens read; more are sampled in evenly spaced pieces.
    """
    pieces = spread_pieces(training, max_scan_tokens)
    run = longest_shared_run(samples, pieces)
    seen = tokens_seen(pieces, vocab_size)
    shared = np.asarray(samples[run.sample])[run.sample_start :][: run.length] if run.length else ()
    return {
        "repetition_rate": _mean(repetition_rate(sample) for sample in samples),
        "natural_repetition_rate": _mean(repetition_rate(text) for text in held_out),
        "distinct_2": _mean(distinct_n(sample, 2) for sample in samples),
        "longest_shared": run.length if samples else None,
        "natural_longest_shared": longest_shared_run(held_out, pieces).length if held_out else None,
        "sample_tokens": max((len(sample) for sample in samples), default=None),
        "longest_shared_tokens": [int(token) for token in shared],
        "vocab_size": vocab_size,
        "unseen_tokens": int(vocab_size - seen.sum()),
        "scanned_tokens": sum(len(piece) for piece in pieces),
        "complete": sum(len(piece) for piece in pieces) == sum(len(stream) for stream in training),
    }


def ensure_overlap(run: RunRecords, run_dir: Path) -> None:
    """Fill `run.overlap` for the latest samples and keep it as ``overlap.json``, if the data is at hand.

    Data that is gone or changed is no error (a report may be made anywhere): the problem is noted in the run.
    """
    step = next((r.get("step") for r in reversed(run.evals) if r.get("samples")), None)
    if step is None or (run.overlap and run.overlap.get("step", step) == step):
        return
    paths = (run.run.get("data") or {}).get("paths") or []
    try:
        run.overlap = {"step": step, **_analyse_run(run, [DatasetSpec(path=str(path)) for path in paths])}
    except (UserError, OSError) as error:
        run.problems.append(f"Samples were not compared with the training text: {error}")
        return
    target = run_dir / "overlap.json"
    part = target.with_name(f".{target.name}.part")
    part.write_text(json.dumps(run.overlap, indent=1) + "\n", encoding="utf-8")
    os.replace(part, target)


def _analyse_run(run: RunRecords, specs: Sequence[DatasetSpec]) -> dict[str, Any]:
    from megalite.data.dataset import open_prepared
    from megalite.data.validation import ValidationSet

    if not specs:
        raise UserError("run.json names no datasets")
    prepared = open_prepared(specs)
    fingerprint = run.run["data"].get("tokenizer_fingerprint")
    if fingerprint not in (None, prepared[0].tokenizer_fingerprint):
        raise UserError(f"{prepared[0].path} was prepared again with another tokenizer")
    latest = next(record for record in reversed(run.evals) if record.get("samples"))
    samples = [np.array(s.get("tokens") or [], dtype=np.int64) for s in latest["samples"]]
    samples = [sample for sample in samples if sample.size]
    return analyse_samples(
        samples,
        [folder.reader("train").stream for folder in prepared],
        _held_out_pieces(ValidationSet(prepared), max((s.size for s in samples), default=0)),
        vocab_size=prepared[0].vocab_size,
    )


def _held_out_pieces(validation: ValidationSet, length: int, count: int = 16) -> list[Tokens]:
    """Beginnings of up to `count` held-out documents, `length` tokens each: samples begin documents too."""
    if not length:
        return []
    selection = validation.select(1 << 18)
    pieces: list[Tokens] = []
    for window in validation.windows(length, 0.0, selection=selection):
        if window.tokens.size == length and len(pieces) < count:
            pieces.append(window.labels)
    return pieces


def _mean(values: Iterable[float]) -> float | None:
    """Mean of the values that are numbers; None if there is none."""
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else None


# --- search -----------------------------------------------------------------------------------------


def _find_shared(texts: Sequence[Tokens], training: Sequence[Tokens], n: int) -> SharedRun | None:
    """First verified window of `n` tokens that a text and a training stream share."""
    hashes, owners, starts = [], [], []
    for owner, text in enumerate(texts):
        hashed = _window_hashes(text, n)
        hashes.append(hashed)
        owners.append(np.full(hashed.size, owner))
        starts.append(np.arange(hashed.size))
    wanted = np.concatenate(hashes)
    order = np.argsort(wanted, kind="stable")
    wanted, owner_of, start_of = wanted[order], np.concatenate(owners)[order], np.concatenate(starts)[order]
    bitmap = np.zeros(1 << BITMAP_BITS, dtype=np.bool_)
    bitmap[_bucket(wanted)] = True

    for number, stream in enumerate(training):
        for first in range(0, len(stream) - n + 1, CHUNK_TOKENS):
            piece = np.asarray(stream[first : first + CHUNK_TOKENS + n - 1])
            hashed = _window_hashes(piece, n)
            candidates = np.flatnonzero(bitmap[_bucket(hashed)])
            place = np.minimum(np.searchsorted(wanted, hashed[candidates]), wanted.size - 1)
            for at, slot in zip(candidates.tolist(), place.tolist(), strict=True):
                while slot < wanted.size and wanted[slot] == hashed[at]:
                    owner, start = int(owner_of[slot]), int(start_of[slot])
                    if np.array_equal(texts[owner][start : start + n], piece[at : at + n]):
                        return SharedRun(n, owner, start, number, first + at)
                    slot += 1
    return None


def _window_hashes(tokens: Tokens, n: int) -> NDArray[np.uint64]:
    """[len - n + 1] hashes of all windows of `n` tokens; empty if there is none."""
    if len(tokens) < n:
        return np.empty(0, dtype=np.uint64)
    powers = np.full(len(tokens), _BASE)
    powers[0] = 1
    inverses = np.full(len(tokens), _INVERSE_BASE)
    inverses[0] = 1
    np.cumprod(powers, out=powers)
    np.cumprod(inverses, out=inverses)
    prefix = np.zeros(len(tokens) + 1, dtype=np.uint64)
    np.cumsum(_code(tokens) * powers, out=prefix[1:])
    return (prefix[n:] - prefix[:-n]) * inverses[: len(tokens) - n + 1]


def _code(tokens: Tokens) -> NDArray[np.uint64]:
    """Spread token ids over 64 bits, so that small ids don't cancel (splitmix64, Steele et al. 2014)."""
    z = np.asarray(tokens).astype(np.uint64) + _BASE
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _bucket(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Bitmap entry of each hash. The top bits: a polynomial's low bits depend on few of its terms."""
    return (hashes >> np.uint64(64 - BITMAP_BITS)).astype(np.int64)
