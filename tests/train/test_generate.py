"""Generation: the cache changes nothing, the seed decides everything, cuts cut what they say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megalite.config import ModelConfig
from megalite.errors import UserError
from megalite.models.transformer import Transformer
from megalite.parallel.random import initialize
from megalite.train.generate import generate, sample_token

SMALL = {"vocab_size": 61, "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "init_std": 0.3}
CONFIGS = {
    "llama": ModelConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=64),
    "mistral": ModelConfig(family="mistral", **SMALL, sliding_window=5),
    "gpt2": ModelConfig(
        family="gpt2",
        **SMALL,
        max_position_embeddings=64,
        norm="layer",
        activation="gelu_tanh",
        position="learned",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    ),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    model = Transformer(CONFIGS[request.param], dtype=torch.float64)
    initialize(model, seed=5)
    return model


@pytest.fixture
def llama():
    model = Transformer(CONFIGS["llama"])
    initialize(model, seed=5)
    return model


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def test_greedy_is_the_likeliest_token_of_the_uncached_model(model):
    ids = list(PROMPT)
    for _ in range(20):
        ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()))
    assert generate(model, PROMPT, max_new_tokens=20, temperature=0) == ids[len(PROMPT) :]


@pytest.mark.parametrize("settings", [{}, {"top_k": 7}, {"top_p": 0.6}, {"temperature": 0.3}])
def test_sampling_with_and_without_the_cache_gives_the_same_text(model, settings):
    texts = [
        generate(model, PROMPT, max_new_tokens=20, seed=9, use_cache=use_cache, **settings)
        for use_cache in (True, False)
    ]
    assert texts[0] == texts[1]


def test_same_seed_same_text_other_seed_other_text(llama):
    first, again, other = (generate(llama, PROMPT, max_new_tokens=30, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_generation_leaves_no_trace(llama):
    state = torch.get_rng_state()
    generate(llama, PROMPT, max_new_tokens=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in llama.parameters())


def test_stops_at_the_end_of_the_document(llama):
    ids = generate(llama, PROMPT, max_new_tokens=30, seed=1)
    cut = generate(llama, PROMPT, max_new_tokens=30, seed=1, eod_id=ids[4])
    assert cut == ids[: ids.index(ids[4])]
    assert generate(llama, PROMPT, max_new_tokens=0) == []


def drawn(logits: torch.Tensor, count: int = 4000, **settings) -> torch.Tensor:
    """How often each token is drawn."""
    generator = torch.Generator().manual_seed(0)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    ids = [sample_token(logits, generator=generator, **settings) for _ in range(count)]
    return torch.tensor(ids).bincount(minlength=len(logits)) / count


PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2], dtype=torch.float64)


def test_frequencies_are_the_models_probabilities():
    frequencies = drawn(PROBABILITIES.log())
    assert (frequencies - PROBABILITIES).abs().max() < 4 * 0.5 / 4000**0.5


def test_temperature_sharpens():
    sharp = PROBABILITIES.square() / PROBABILITIES.square().sum()
    assert (drawn(PROBABILITIES.log(), temperature=0.5) - sharp).abs().max() < 4 * 0.5 / 4000**0.5


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.84}, [1, 3, 4]),
        ({"top_p": 0.96}, [0, 1, 2, 3, 4]),
        ({"top_k": 2, "top_p": 0.9}, [1, 3]),
    ],
)
def test_cuts_keep_the_likeliest_in_their_proportions(settings, kept):
    frequencies = drawn(PROBABILITIES.log(), **settings)
    expected = torch.zeros(5, dtype=torch.float64)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    assert frequencies.nonzero().flatten().tolist() == kept
    assert (frequencies - expected).abs().max() < 4 * 0.5 / 4000**0.5


def test_among_equal_tokens_the_first_survive_a_cut():
    frequencies = drawn(torch.zeros(6), top_k=2, count=200)
    assert frequencies.nonzero().flatten().tolist() == [0, 1]


def test_errors(llama):
    limit = "a prompt of 8 tokens and max_new_tokens=57 need more than the 64 positions"
    with pytest.raises(UserError, match=limit + ".* at most 56 tokens"):
        generate(llama, PROMPT, max_new_tokens=57)
    generate(llama, PROMPT, max_new_tokens=56)
    cases = {
        "the prompt is empty": {"prompt_ids": []},
        "token id 61 of the prompt is not in the model's vocabulary of 61": {"prompt_ids": [3, 61]},
        "max_new_tokens=-1 must not be negative": {"max_new_tokens": -1},
        "temperature=-0.1 must not be negative": {"temperature": -0.1},
        "temperature=nan must not be negative": {"temperature": float("nan")},
        "top_k=-1 must not be negative": {"top_k": -1},
        r"top_p=0.0 must be in \(0, 1\]": {"top_p": 0.0},
        r"top_p=1.5 must be in \(0, 1\]": {"top_p": 1.5},
    }
    for message, change in cases.items():
        arguments = {"prompt_ids": PROMPT, "max_new_tokens": 4} | change
        with pytest.raises(UserError, match=message):
            generate(llama, **arguments)


def test_window_of_the_default_configuration_is_not_what_is_tested():
    """The mistral case really has a window shorter than its text."""
    config = CONFIGS["mistral"]
    wide = Transformer(dataclasses.replace(config, sliding_window=0), dtype=torch.float64)
    narrow = Transformer(config, dtype=torch.float64)
    for model in (wide, narrow):
        initialize(model, seed=5)
    texts = [generate(m, PROMPT, max_new_tokens=20, temperature=0) for m in (wide, narrow)]
    assert texts[0] != texts[1]
