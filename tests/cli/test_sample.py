"""``megalite sample``, and the tokenizer files that exported folders carry."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tokenizers
import torch
import transformers

from megalite.cli.main import main
from megalite.config import ModelConfig
from megalite.data.tokenize import Tokenizer
from megalite.errors import UserError
from megalite.interop.hf import export_folder, folder_texts, model_pieces
from megalite.models.transformer import Transformer
from megalite.parallel.random import initialize

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs\n" * 20


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], vocab_size=300)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, num_layers=2, hidden_size=32, ffn_hidden_size=48, init_std=0.3
    )
    model = Transformer(config)
    initialize(model, seed=1)
    texts = folder_texts(config, tokenizer=tokenizer.definition, eod_id=tokenizer.eod_id)
    folder = tmp_path_factory.mktemp("sample") / "model"
    return export_folder(folder, config, model_pieces(model), texts=texts)


def run(capsys, *arguments: str) -> tuple[int, str, dict]:
    code = main(["sample", *arguments, "--json"])
    lines = capsys.readouterr().out.splitlines()
    return code, "\n".join(lines[:-1]), json.loads(lines[-1])


def test_samples_are_printed_and_repeatable(folder, tokenizer, capsys):
    arguments = [str(folder), "--prompt", "the quick", "--max-new-tokens", "12", "--num-samples", "2"]
    code, text, result = run(capsys, *arguments)
    assert code == 0
    assert result["prompt_tokens"] == [tokenizer.eod_id, *tokenizer.encode("the quick")]
    first, second = result["samples"]
    assert first["tokens"] != second["tokens"]
    assert first["text"] == tokenizer.decode(first["tokens"])
    assert len(first["tokens"]) == first["new_tokens"] <= 12
    assert "the quick" + first["text"].splitlines()[0] in text
    _, _, again = run(capsys, *arguments)
    assert again["samples"] == result["samples"]
    _, _, later = run(capsys, *arguments[:-2], "--seed", "1")
    assert later["samples"][0] == second


def test_greedy_needs_no_seed(folder, capsys):
    arguments = [str(folder), "--temperature", "0", "--max-new-tokens", "8", "--seed"]
    first, second = (run(capsys, *arguments, seed)[2]["samples"][0] for seed in ("1", "2"))
    assert first["tokens"] == second["tokens"]


def test_agrees_with_transformers_generation(folder, tokenizer, capsys):
    arguments = ["--prompt", "lazy", "--temperature", "0", "--max-new-tokens", "10"]
    _, _, result = run(capsys, str(folder), *arguments)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor([result["prompt_tokens"]])
    mask = torch.ones_like(tokens)
    theirs = model.generate(tokens, attention_mask=mask, max_new_tokens=10, do_sample=False)
    new = theirs[0, tokens.shape[1] :].tolist()
    expected = new[: new.index(tokenizer.eod_id)] if tokenizer.eod_id in new else new
    assert result["samples"][0]["tokens"] == expected


def test_autotokenizer_loads_what_we_write(folder, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = "pack my box, naïve 漢字 \n\n  twice"
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token == theirs.bos_token == tokenizer.eod_token
    assert theirs.eos_token_id == tokenizer.eod_id
    assert set(theirs(text)) == {"input_ids", "attention_mask"}
    assert len(theirs) == tokenizer.vocab_size


def test_a_folder_of_transformers_starts_with_its_own_token(folder, tokenizer, tmp_path, capsys):
    """Llama's tokenizers have a beginning-of-text token that is not the end-of-text token."""
    other = tmp_path / "llama"
    assert main(["import", str(folder), str(other)]) == 0
    raw = tokenizers.Tokenizer.from_str(tokenizer.definition)
    start = raw.encode("the").ids[0]
    settings = {"bos_token": {"content": raw.id_to_token(start)}, "eos_token": tokenizer.eod_token}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    capsys.readouterr()
    _, _, result = run(capsys, str(other), "--prompt", "dog", "--max-new-tokens", "2")
    assert result["prompt_tokens"] == [start, *tokenizer.encode("dog")]


def test_wrong_input_gives_one_clear_line(folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    assert main(["import", str(folder), str(bare)]) == 0
    (bare / "tokenizer.json").unlink()
    capsys.readouterr()
    cases = {
        "nowhere does not exist": [str(tmp_path / "nowhere")],
        "tokenizer.json does not exist": [str(bare)],
        "need more than the 4096 positions": [str(folder), "--max-new-tokens", "5000"],
        "--num-samples=0 must be at least 1": [str(folder), "--num-samples", "0"],
        "top_p=2.0 must be in (0, 1]": [str(folder), "--top-p", "2"],
    }
    for message, arguments in cases.items():
        assert main(["sample", *arguments]) == 2
        out, err = capsys.readouterr()
        assert message in err
        assert err.startswith("megalite: error: ")
        assert err.count("\n") == 1
        assert not out


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer):
    config = ModelConfig(vocab_size=tokenizer.vocab_size - 1)
    with pytest.raises(UserError, match=r"largest token id 299 does not fit model\.vocab_size=299"):
        folder_texts(config, tokenizer=tokenizer.definition, eod_id=tokenizer.eod_id)
    with pytest.raises(UserError, match="no token with the end-of-document id 300"):
        folder_texts(dataclasses.replace(config, vocab_size=999), tokenizer=tokenizer.definition, eod_id=300)
