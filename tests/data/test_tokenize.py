"""Tokenizers: training, special tokens in text, foreign definitions, fingerprints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.tokenize import EOD_TOKEN, Tokenizer, canonical_json, fingerprint
from megalite.errors import UserError

TEXTS = [f"def function_{i}(argument):\n    return argument + {i}\n" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=400)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "x"])[0] == ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_training_is_deterministic_and_of_the_asked_size(tokenizer: Tokenizer):
    again = Tokenizer.train(iter(TEXTS), vocab_size=400)
    assert again.definition == tokenizer.definition
    assert again.fingerprint == tokenizer.fingerprint
    assert tokenizer.vocab_size <= 400
    assert len(tokenizer.encode(TEXTS[7])) < len(TEXTS[7]) / 3
    assert Tokenizer.train(TEXTS, vocab_size=300).vocab_size == 300


def test_text_cannot_forge_a_document_end(tokenizer: Tokenizer):
    text = f"before{EOD_TOKEN}after"
    assert tokenizer.eod_id not in tokenizer.encode(text)
    assert tokenizer.eod_id not in tokenizer.encode_batch([text])[0]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_text(tokenizer.eod_id) == EOD_TOKEN


def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.eod_id == tokenizer.eod_id
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == tokenizer.definition
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_fingerprint_ignores_spelling_only(tokenizer: Tokenizer):
    definition = json.loads(tokenizer.definition)
    respelt = json.dumps(definition, ensure_ascii=True, indent=None)
    assert fingerprint(respelt) == tokenizer.fingerprint
    assert canonical_json(respelt) == tokenizer.definition
    definition["model"]["merges"] = definition["model"]["merges"][:-1]
    assert fingerprint(json.dumps(definition)) != tokenizer.fingerprint


def test_a_foreign_tokenizer(tmp_path: Path):
    """Padding and truncation stored in the file are not applied; the missing EOD is added as the next id."""
    import tokenizers

    foreign = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    foreign.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    foreign.enable_truncation(max_length=2)
    foreign.enable_padding(length=9)
    foreign.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        UserError, match=r"tokenizer.json has no token '<\|endoftext\|>': name .* --eod-token"
    ):
        Tokenizer.load(tmp_path)
    added = Tokenizer.load(tmp_path, add_eod=True)
    assert (added.eod_id, added.vocab_size) == (3, 4)
    assert added.encode("a b a z") == [0, 1, 0, 2] == added.encode_batch(["a b a z"])[0]
    assert Tokenizer.load(tmp_path, eod_token="b").eod_id == 1


def test_unusable_definitions(tmp_path: Path):
    with pytest.raises(UserError, match=r"tokenizer .*missing.json does not exist: give a tokenizer.json"):
        Tokenizer.load(tmp_path / "missing.json")
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match=r"tokenizer.json is not a Hugging Face tokenizer.json: "):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        Tokenizer.load(tmp_path)


def test_limits(tokenizer: Tokenizer):
    with pytest.raises(UserError, match="--vocab-size=256 must be at least 257"):
        Tokenizer.train(TEXTS, vocab_size=256)
    with pytest.raises(UserError, match="token id 99999 is not in the vocabulary"):
        tokenizer.token_text(99999)
