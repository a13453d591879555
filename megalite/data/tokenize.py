"""Tokenizers: any Hugging Face ``tokenizer.json``, or a byte-level BPE trained here, behind one class."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from megalite.data.word_cache import WordCache
from megalite.errors import UserError

EOD_TOKEN = "<|endoftext|>"
"""Default end-of-document token."""
FILE_NAME = "tokenizer.json"
BYTES_IN_ALPHABET = 256


class Tokenizer:
    """Text ↔ token ids, with an end-of-document (EOD) token.

    Text is never parsed for special tokens: a document that spells out ``<|endoftext|>`` is encoded as those
    thirteen characters, so no text can forge a document boundary.

    Args:
        definition: contents of a ``tokenizer.json``.
        eod_token: the end-of-document token; added (as the next id) where `add_eod` allows it.
        where: name used in error messages.
        add_eod: add a missing EOD token instead of raising.

    Raises:
        UserError: the definition is not a tokenizer, or has no such token.
    """

    def __init__(
        self,
        definition: str,
        *,
        eod_token: str = EOD_TOKEN,
        where: str = FILE_NAME,
        add_eod: bool = False,
    ) -> None:
        import tokenizers  # lazily: reading a prepared dataset needs numpy and torch alone

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{where} is not a Hugging Face tokenizer.json: {error}") from None
        # Padding or truncation stored in the file would silently change documents.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        if self._tokenizer.token_to_id(eod_token) is None:
            if not add_eod:
                raise UserError(
                    f"{where} has no token {eod_token!r}: name its end-of-document token with --eod-token"
                )
            self._tokenizer.add_special_tokens([eod_token])
        self.eod_token = eod_token
        self.eod_id = cast(int, self._tokenizer.token_to_id(eod_token))
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        """One more than the largest token id (ids may have gaps)."""
        parsed = json.loads(self._tokenizer.to_str())
        self.definition = _canonical(parsed)
        self.fingerprint = _sha256(self.definition)
        self._words = WordCache(self._encode_directly) if WordCache.fits(parsed) else None

    @classmethod
    def load(cls, path: str | Path, *, eod_token: str = EOD_TOKEN, add_eod: bool = False) -> Tokenizer:
        """From a ``tokenizer.json``, or a folder that holds one (a Hugging Face or dataset folder).

        Raises:
            UserError: there is no such file, or it is no tokenizer.
        """
        file = Path(path)
        if file.is_dir():
            file = file / FILE_NAME
        try:
            definition = file.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"tokenizer {file} does not exist: give a tokenizer.json or a folder with one"
            ) from None
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text: {error}") from None
        return cls(definition, eod_token=eod_token, where=str(file), add_eod=add_eod)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, eod_token: str = EOD_TOKEN) -> Tokenizer:
        """A byte-level BPE of exactly `vocab_size` tokens (fewer if the text has too few pairs to merge).

        Uses GPT-2's pre-tokenization; every byte is in the alphabet, so any text can be encoded.

        Raises:
            UserError: vocab_size is below the 256 bytes and the EOD token.
        """
        import tokenizers

        smallest = BYTES_IN_ALPHABET + 1
        if vocab_size < smallest:
            raise UserError(
                f"--vocab-size={vocab_size} must be at least {smallest}: 256 bytes and {eod_token}"
            )
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[eod_token],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str(), eod_token=eod_token)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without EOD."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, without EOD; much cheaper than one by one (see `word_cache`)."""
        return self._encode_directly(texts) if self._words is None else self._words.encode(texts)

    def _encode_directly(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens included; a cut multi-byte character becomes U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary spells it (byte-level alphabets spell a space as Ġ)."""
        text = self._tokenizer.id_to_token(token_id)
        if text is None:
            raise UserError(f"token id {token_id} is not in the vocabulary of {self.vocab_size}")
        return str(text)

    def save(self, path: str | Path) -> None:
        """Write the canonical ``tokenizer.json``, atomically; `path` may be a folder."""
        file = Path(path)
        if file.is_dir():
            file = file / FILE_NAME
        temporary = file.with_name(file.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as out:
            out.write(self.definition)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)


def canonical_json(definition: str) -> str:
    """One spelling for equal definitions: sorted keys, one line, no ASCII escapes."""
    return _canonical(json.loads(definition))


def fingerprint(definition: str) -> str:
    """SHA-256 (hex) of a tokenizer definition's canonical spelling: what datasets and checkpoints compare."""
    return _sha256(canonical_json(definition))


def _canonical(parsed: Any) -> str:
    # No indent: with one, json leaves its C encoder, and a large vocabulary takes seconds.
    return json.dumps(parsed, ensure_ascii=False, sort_keys=True) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
