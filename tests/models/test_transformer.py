"""The transformer as a whole: packing, the cache, padding rows, dtypes, errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megalite.config import IGNORE_INDEX, ModelConfig
from megalite.errors import UserError
from megalite.models.presets import preset
from megalite.models.transformer import Transformer
from megalite.parallel.random import initialize

SMALL = {"vocab_size": 97, "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "init_std": 0.2}
GPT2 = ModelConfig(
    family="gpt2",
    **SMALL,
    max_position_embeddings=64,
    norm="layer",
    activation="gelu_tanh",
    position="learned",
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
)
CONFIGS = {
    "llama": ModelConfig(**SMALL, num_key_value_heads=2),
    "gpt2": GPT2,
    "qwen3": ModelConfig(family="qwen3", **SMALL, num_key_value_heads=2, head_dim=32, qk_norm=True),
    "mistral": ModelConfig(family="mistral", **SMALL, num_key_value_heads=1, sliding_window=6),
}


def make(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 1) -> Transformer:
    model = Transformer(config, dtype=dtype)
    initialize(model, seed)
    return model


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


LENGTHS = (13, 1, 20, 7)
CU_SEQLENS = torch.tensor([0, 13, 14, 34, 41], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])


def packed_run(model: Transformer, tokens: torch.Tensor, cu_seqlens: torch.Tensor = CU_SEQLENS):
    """Final hidden states, token losses' sum per document, and input gradients of the third document."""
    model.zero_grad()
    hidden = model(tokens, positions=POSITIONS, cu_seqlens=cu_seqlens, max_seqlen=20)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    labels[14:33] = tokens[15:34]  # the loss of the third document alone
    loss = model.loss(tokens, labels, positions=POSITIONS, cu_seqlens=cu_seqlens, max_seqlen=20)
    loss.backward()
    return hidden.detach(), loss.detach(), [p.grad.clone() for p in model.parameters()]


def replace_other_documents(tokens: torch.Tensor) -> torch.Tensor:
    changed = (tokens + 11) % 97
    changed[14:34] = tokens[14:34]
    return changed


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_do_not_leak(name, dtype):
    """Replacing the other documents' tokens changes no bit of a document's output, loss or gradients."""
    model = make(CONFIGS[name], dtype)
    tokens = random_tokens(41)
    hidden, loss, grads = packed_run(model, tokens)
    hidden_after, loss_after, grads_after = packed_run(model, replace_other_documents(tokens))
    assert torch.equal(hidden[14:34], hidden_after[14:34])
    assert not torch.equal(hidden[:13], hidden_after[:13])
    assert torch.equal(loss, loss_after)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_after, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_documents_leak_without_their_boundaries(name):
    """The test above can fail: with one boundary left out, the other document is seen."""
    model = make(CONFIGS[name])
    tokens = random_tokens(41)
    merged = torch.tensor([0, 14, 41], dtype=torch.int32)  # documents three and four as one
    changed = replace_other_documents(tokens)
    dropped = torch.tensor([0, 13, 34, 41], dtype=torch.int32)  # two and three as one
    assert torch.equal(
        packed_run(model, tokens, merged)[0][14:34], packed_run(model, changed, merged)[0][14:34]
    )
    before, after = (packed_run(model, t, dropped)[0][14:34] for t in (tokens, changed))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_documents_alone(name):
    model = make(CONFIGS[name], torch.float64)
    tokens = random_tokens(41)
    packed = model(tokens, positions=POSITIONS, cu_seqlens=CU_SEQLENS, max_seqlen=20)
    alone = torch.cat([model(document[None])[0] for document in tokens.split(LENGTHS)])
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_restart_in_each_document_by_default(name):
    model = make(CONFIGS[name])
    tokens = random_tokens(41)
    given = model(tokens, positions=POSITIONS, cu_seqlens=CU_SEQLENS, max_seqlen=20)
    assert torch.equal(model(tokens, cu_seqlens=CU_SEQLENS, max_seqlen=20), given)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_position_sees_what_follows(name):
    model = make(CONFIGS[name])
    tokens = random_tokens(1, 30)
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 97
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:20], after[:20])
    assert (before[20:] != after[20:]).any(-1).all()


def test_a_sliding_window_hides_what_lies_further_back():
    config = dataclasses.replace(CONFIGS["mistral"], num_layers=1)
    model = make(config)
    tokens = random_tokens(1, 30)
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 97
    differs = (model(tokens)[0] != model(changed)[0]).any(-1)
    assert differs.nonzero().flatten().tolist() == list(range(10, 16))  # itself and the five after it


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunks", [(1,) * 24, (10, 1, 13), (24,)])
def test_cached_equals_uncached(name, chunks):
    model = make(CONFIGS[name])
    tokens = random_tokens(3, 24)
    whole = model.logits(model(tokens))
    cache = model.new_cache(batch_size=3, capacity=24)
    parts = [model.logits(model(part, cache=cache)) for part in tokens.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_rows_get_no_probability_and_no_gradient(name):
    model = make(CONFIGS[name])
    tokens, labels = random_tokens(2, 16), random_tokens(2, 16, seed=1)
    assert model.logits(model(tokens)).shape == (2, 16, 97)
    loss = model.loss(tokens, labels)
    loss.backward()
    for parameter in {model.embedding.weight, (model.head or model.embedding).weight}:
        assert parameter.shape[0] == 128
        assert not parameter.grad[97:].any()
        parameter.data[97:] = 100.0  # whatever they hold, they must not matter
    assert torch.equal(model.loss(tokens, labels), loss)


def test_loss_skips_ignored_labels():
    model = make(CONFIGS["llama"])
    tokens, labels = random_tokens(2, 16), random_tokens(2, 16, seed=1)
    half = labels.clone()
    half[:, 8:] = IGNORE_INDEX
    other = labels.clone()
    other[:, :8] = IGNORE_INDEX
    total = model.loss(tokens, labels)
    assert torch.allclose(model.loss(tokens, half) + model.loss(tokens, other), total, rtol=1e-6)
    assert model.loss(tokens, torch.full_like(labels, IGNORE_INDEX)) == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_stays_near_fp32(name):
    """bf16 keeps 8 bits; through two layers the error stays within a few of its roundings."""
    exact, rough = make(CONFIGS[name]), make(CONFIGS[name], torch.bfloat16)
    tokens, labels = random_tokens(2, 32), random_tokens(2, 32, seed=1)
    expected, got = exact.loss(tokens, labels), rough.loss(tokens, labels)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected.item(), rel=2e-2)
    assert rough(tokens).dtype == torch.bfloat16


def test_builds_on_meta_without_memory():
    """70 billion parameters on a laptop: the shapes only."""
    model = Transformer(preset("llama3-70b"), device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == 70_553_706_496


def test_built_on_meta_then_initialised_equals_built_directly():
    model = Transformer(CONFIGS["qwen3"], device="meta").to_empty(device="cpu")
    initialize(model, 1)
    tokens = random_tokens(2, 16)
    assert torch.equal(model(tokens), make(CONFIGS["qwen3"])(tokens))


def test_the_initial_loss_is_that_of_a_uniform_guess():
    model = make(dataclasses.replace(CONFIGS["llama"], init_std=0.02))
    tokens, labels = random_tokens(4, 32), random_tokens(4, 32, seed=1)
    per_token = model.loss(tokens, labels).item() / labels.numel()
    assert per_token == pytest.approx(torch.tensor(97.0).log().item(), abs=0.05)


def test_the_loss_compiles_into_one_graph():
    model = make(CONFIGS["qwen3"])
    tokens = random_tokens(41)
    batch = {"positions": POSITIONS, "cu_seqlens": CU_SEQLENS, "max_seqlen": 20}
    expected = model.loss(tokens, tokens, **batch)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    loss = compiled(tokens, tokens, **batch)
    assert torch.equal(loss, expected)
    loss.backward()
    compiled_grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected.backward()
    for got, parameter in zip(compiled_grads, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


def filled_cache(model: Transformer, length: int):
    cache = model.new_cache(1, 100)
    model(random_tokens(1, length), cache=cache)
    return cache


def test_errors():
    model = make(CONFIGS["llama"])
    with pytest.raises(ValueError, match=r"packed tokens \[T\] need cu_seqlens"):
        model(random_tokens(8))
    with pytest.raises(ValueError, match=r"packed tokens \[T\], but the tokens are \[1, 8\]"):
        model(random_tokens(1, 8), cu_seqlens=torch.tensor([0, 8], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"a key/value cache needs tokens as \[B, S\]"):
        model(random_tokens(8), cu_seqlens=CU_SEQLENS, cache=model.new_cache(1, 8))
    with pytest.raises(ValueError, match="9 tokens do not fit a cache of capacity 8"):
        model(random_tokens(1, 9), cache=model.new_cache(1, 8))
    gpt2 = make(CONFIGS["gpt2"])
    with pytest.raises(ValueError, match="65 tokens in a row need more than the 64 learned positions"):
        gpt2(random_tokens(1, 65))
    with pytest.raises(ValueError, match="65 tokens in a row need more than the 64 learned positions"):
        gpt2(random_tokens(1, 5), cache=filled_cache(gpt2, 60))
    with pytest.raises(UserError, match=r"model\.vocab_size=0 must be greater than 0"):
        Transformer(ModelConfig())
