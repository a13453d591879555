"""Byte-level BPE from a cache of words: the same ids as the tokenizer, several times sooner.

Byte-level BPE first splits text into words by a fixed pattern and then merges within each word, so a word has
the same ids wherever it stands. Natural text repeats its words: finding them with Python's ``re`` and looking
them up costs far less than merging them anew. The tokenizer itself encodes words that were not seen yet, and
parts of texts with characters whose class (letter, number, space) may differ between versions of Unicode.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

MAX_CHARACTERS = 1_500_000
"""Characters of words kept before the cache starts anew: at most about 70 MB."""
SEGMENT = 2048
"""Characters after which a text that is not covered is cut: it stays with the tokenizer in such parts only."""
SAFE_CUT = re.compile(r"\S\n(?=\S)")
"""Where no word crosses: a line end alone between two characters that are no spaces is a word of its own."""
SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""Unicode's White_Space (Python's own ``\\s`` also has the separators 0x1C to 0x1F)."""
COVERED = (
    (0x0000, 0x0377),  # Latin, IPA, combining marks, the beginning of Greek
    (0x037A, 0x037F),
    (0x0400, 0x052F),  # Cyrillic
    (0x2000, 0x2064),  # punctuation
    (0x2070, 0x2071),
    (0x2074, 0x208E),
    (0x20A0, 0x20BF),  # currencies
    (0x2100, 0x218B),  # letter-like symbols, number forms
    (0x2190, 0x2426),  # arrows, mathematics, technical
    (0x2460, 0x2B73),  # enclosed, box drawing, symbols, arrows
    (0x3000, 0x303F),  # CJK punctuation
    (0x3041, 0x3096),  # kana
    (0x3099, 0x30FF),
    (0x4E00, 0x9FA5),  # CJK
    (0xAC00, 0xD7A3),  # Hangul
    (0xFF01, 0xFFBE),  # full-width forms
    (0x1F300, 0x1F64F),  # emoji
)
"""Code points whose class has not changed since Unicode 10; the tests compare each with the tokenizer."""


class WordCache:
    """Encodes texts word by word; made only for tokenizers that `fit`.

    Args:
        encode_directly: ids of several texts by the tokenizer itself.
    """

    def __init__(self, encode_directly: Callable[[list[str]], list[list[int]]]) -> None:
        self._encode_directly = encode_directly
        self._known: dict[str, list[int]] = {}
        self._characters = 0
        self._ascii = _word_pattern(((0, 0x7F),))
        self._wide = _word_pattern(COVERED)
        self._uncovered = re.compile(f"[^{_ranges(COVERED)}]")

    @staticmethod
    def fits(definition: dict[str, Any]) -> bool:
        """True for a ``tokenizer.json`` with GPT-2's word pattern and nothing that looks beyond a word."""
        words = definition.get("pre_tokenizer") or {}
        return (
            definition.get("normalizer") is None
            and words.get("type") == "ByteLevel"
            and words.get("add_prefix_space") is False
            and words.get("use_regex") is True
            and (definition.get("model") or {}).get("type") == "BPE"
            and not (definition.get("model") or {}).get("dropout")
            # Other added tokens are found in the text before it is split into words.
            and all(token["special"] for token in definition.get("added_tokens") or ())
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        if self._characters > MAX_CHARACTERS:
            self._known, self._characters = {}, 0
        return [
            list(itertools.chain.from_iterable(self._encode_segment(part) for part in self._segments(text)))
            for text in texts
        ]

    def covers(self, text: str) -> bool:
        """True if every character of the text has a fixed class."""
        return text.isascii() or self._uncovered.search(text) is None

    def _segments(self, text: str) -> Iterator[str]:
        """The text if it is covered, else parts of it whose words are those of the text."""
        start = 0
        if not self.covers(text):
            while (cut := SAFE_CUT.search(text, start + SEGMENT)) is not None:
                yield text[start : cut.end()]
                start = cut.end()
        yield text[start:]

    def _encode_segment(self, text: str) -> Iterable[int]:
        if not self.covers(text):
            return self._encode_directly([text])[0]
        known = self._known
        words = (self._ascii if text.isascii() else self._wide).findall(text)
        new = [word for word in set(words) if word not in known]
        known.update(zip(new, self._encode_directly(new), strict=True))
        self._characters += sum(map(len, new))
        return itertools.chain.from_iterable(map(known.__getitem__, words))


def _word_pattern(covered: Sequence[tuple[int, int]]) -> re.Pattern[str]:
    """GPT-2's pattern for texts of these code points.

    Source: ``encoder.py`` of openai/gpt-2, with the classes spelt out that ``re`` has no names for.
    """
    letters, numbers = _class("L", covered), _class("N", covered)
    return re.compile(
        f"'s|'t|'re|'ve|'m|'ll|'d| ?[{letters}]+| ?[{numbers}]+| ?[^{SPACES}{letters}{numbers}]+"
        f"|[{SPACES}]+(?![^{SPACES}])|[{SPACES}]+"
    )


def _class(category: str, covered: Sequence[tuple[int, int]]) -> str:
    """The code points of a general category, as the inside of a character class."""
    members = (
        c
        for low, high in covered
        for c in range(low, high + 1)
        if unicodedata.category(chr(c))[0] == category
    )
    return _ranges(_runs(members))


def _runs(numbers: Iterator[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as inclusive runs."""
    low = high = -2
    for number in numbers:
        if number != high + 1:
            if low >= 0:
                yield low, high
            low = number
        high = number
    if low >= 0:
        yield low, high


def _ranges(runs: Sequence[tuple[int, int]] | Iterator[tuple[int, int]]) -> str:
    return "".join(f"{re.escape(chr(low))}-{re.escape(chr(high))}" for low, high in runs)
