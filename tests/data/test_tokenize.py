"""Tokenizers: training, special tokens in text, foreign definitions, fingerprints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.tokenize import EOD_TOKEN, Tokenizer, canonical_json, fingerprint
from megalite.data.word_cache import COVERED, WordCache
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


class TestWordCache:
    """Word by word or directly: the ids must be the same."""

    def agree(self, tokenizer: Tokenizer, texts: list[str]) -> None:
        assert tokenizer.encode_batch(texts) == tokenizer._encode_directly(texts)
        # Ids hide wrong words where no merge crosses them: compare the words too.
        for text in filter(tokenizer._words.covers, texts):
            pattern = tokenizer._words._ascii if text.isascii() else tokenizer._words._wide
            expected = tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str(text)
            assert [match.span() for match in pattern.finditer(text)] == [span for _, span in expected]

    def test_every_covered_character(self, tokenizer: Tokenizer):
        """Beside letters, digits, spaces, marks and itself: its class decides where words end."""
        characters = [chr(c) for low, high in COVERED for c in range(low, high + 1)]
        texts = [
            "".join(f"a{c}1{c} {c}{c}!{c}\n" for c in characters[i : i + 500])
            for i in range(0, len(characters), 500)
        ]
        assert all(map(tokenizer._words.covers, texts))
        self.agree(tokenizer, texts)

    @settings(max_examples=300, deadline=None)
    @given(texts=st.lists(st.text(alphabet=" \n\t'sreva1.\x1cé€中😀\u0378\u3000", max_size=40), max_size=4))
    def test_any_mixture(self, tokenizer: Tokenizer, texts: list[str]):
        self.agree(tokenizer, texts)

    def test_uncovered_characters_are_left_to_the_tokenizer(self, tokenizer: Tokenizer):
        assert not tokenizer._words.covers("a\u0378")
        line = "a line \u0e01 of Thai, with  spaces.\n"
        mixed = [
            line * 200,
            "x\n" * 3000 + line,
            (line + "\n") * 150,
            (line + " \n\u2028") * 99,
            "\u0378\n" * 5000,
        ]
        self.agree(tokenizer, mixed)
        assert len(list(tokenizer._words._segments(mixed[0]))) > 2
        self.agree(tokenizer, ["plain", "Thai \u0e01\u0e02", "unassigned \u0378", "plain again"])

    @settings(max_examples=100, deadline=None)
    @given(text=st.text(alphabet="ab \n\t.\x1c\u0e01", max_size=60))
    def test_cuts_of_uncovered_texts(self, tokenizer: Tokenizer, text: str):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("megalite.data.word_cache.SEGMENT", 3)
            self.agree(tokenizer, [text, text + "\u0e01"])

    def test_it_starts_anew_when_full(self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("megalite.data.word_cache.MAX_CHARACTERS", 100)
        for start in range(0, 200, 20):
            self.agree(tokenizer, TEXTS[start : start + 20])
        assert tokenizer._words._characters < 1000

    def test_which_tokenizers_fit(self, tokenizer: Tokenizer):
        definition = json.loads(tokenizer.definition)
        assert WordCache.fits(definition)
        for changed in (
            {"normalizer": {"type": "NFC"}},
            {"pre_tokenizer": None},
            {"pre_tokenizer": {**definition["pre_tokenizer"], "add_prefix_space": True}},
            {"pre_tokenizer": {**definition["pre_tokenizer"], "use_regex": False}},
            {"model": {**definition["model"], "dropout": 0.1}},
            {"model": {**definition["model"], "type": "Unigram"}},
            {"added_tokens": [{**definition["added_tokens"][0], "special": False}]},
        ):
            assert not WordCache.fits({**definition, **changed})
