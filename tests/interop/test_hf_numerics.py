"""Every family computes what transformers computes: logits and all gradients, in float32 and float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megalite.interop.hf import load_folder, model_pieces
from megalite.models.families import hf_tensors
from megalite.models.transformer import Transformer
from megalite.parallel.pieces import iter_pieces, piece_view
from tests.interop.hf_models import CASES, WidenFloat32, build


@pytest.fixture
def pair(request, tmp_path):
    name, dtype = request.param
    theirs = build(name, dtype)
    theirs.save_pretrained(tmp_path)
    return theirs, load_folder(tmp_path, dtype=dtype)


def tokens_and_weights(model: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    tokens = torch.randint(vocab, (2, 40), generator=generator)
    # A random linear functional of the logits sends a gradient through every one of them.
    weights = torch.randn(2, 40, vocab, generator=generator, dtype=torch.float64)
    return tokens, weights / weights.numel() ** 0.5


def hf_gradients(theirs: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}


def our_gradients(ours: Transformer) -> dict[str, torch.Tensor]:
    """Gradients under their Hugging Face names and layouts."""
    grads = {piece.name: piece_view(p.grad, piece) for p, _, piece in iter_pieces(ours)}
    return {t.name: t.assemble(grads.__getitem__) for t in hf_tensors(ours.config)}


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    scale = expected.abs().max().clamp_min(1e-3)
    error = ((got.double() - expected.double()).abs().max() / scale).item()
    assert error < tolerance, f"{what}: relative error {error:.2e}"


# Relative to each tensor's largest value. float32: some hundred additions, each within 6e-8.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.mark.parametrize(
    "pair",
    [(name, dtype) for name in CASES for dtype in TOLERANCE],
    ids=lambda p: f"{p[0]}-{str(p[1]).removeprefix('torch.')}",
    indirect=True,
)
def test_logits_and_gradients_equal_transformers(pair):
    theirs, ours = pair
    dtype = ours.embedding.weight.dtype
    tokens, weights = tokens_and_weights(ours)
    if dtype == torch.float64:
        with WidenFloat32():
            expected = theirs(tokens).logits
    else:
        expected = theirs(tokens).logits
    got = ours.logits(ours(tokens))
    assert got.dtype == expected.dtype == dtype
    assert_close(got, expected, TOLERANCE[dtype], "logits")

    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    grads = our_gradients(ours)
    expected_grads = hf_gradients(theirs)
    assert grads.keys() == expected_grads.keys()
    for name, gradient in grads.items():
        assert_close(gradient, expected_grads[name], TOLERANCE[dtype], name)
    for parameter in ours.parameters():
        assert parameter.grad is not None
    assert not ours.embedding.weight.grad[ours.config.vocab_size :].any()


def run(model: nn.Module, tokens: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and all gradients under Hugging Face names."""
    ours = isinstance(model, Transformer)
    logits = model.logits(model(tokens)) if ours else model(tokens).logits
    (logits * weights).sum().backward()
    return {"logits": logits.detach()} | (our_gradients(model) if ours else hf_gradients(model))


@pytest.mark.parametrize("name", CASES)
def test_bf16_is_as_accurate_as_transformers_bf16(name, tmp_path):
    """Both round at every operation, in other places; a tensor of ours may err at most twice as much."""
    truth, theirs = build(name, torch.float64), build(name, torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    truth.load_state_dict({k: v.double() for k, v in theirs.state_dict().items()})
    ours = load_folder(tmp_path, dtype=torch.bfloat16)
    tokens, weights = tokens_and_weights(ours)
    with WidenFloat32():
        exact = run(truth, tokens, weights)

    def errors(values: dict[str, torch.Tensor]) -> dict[str, float]:
        return {k: ((values[k].double() - v).norm() / v.norm()).item() for k, v in exact.items()}

    theirs_err, ours_err = (errors(run(model, tokens, weights)) for model in (theirs, ours))
    assert max(theirs_err.values()) < 0.5, "the comparison says nothing"
    worse = {k: (e, theirs_err[k]) for k, e in ours_err.items() if e > 2 * theirs_err[k] + 2e-3}
    assert not worse


@pytest.mark.parametrize("pair", [("llama", torch.float32), ("gpt2", torch.float32)], indirect=True)
def test_loss_is_the_sum_of_transformers_token_losses(pair):
    theirs, ours = pair
    tokens, _ = tokens_and_weights(ours)
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = -100
    labels[0, 3:9] = -100
    logits = theirs(tokens).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = ours.loss(tokens, labels)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    loss.backward()
    expected_grads = hf_gradients(theirs)
    for name, gradient in our_gradients(ours).items():
        assert_close(gradient, expected_grads[name], 1e-5, name)


def test_a_wrong_layout_would_be_noticed(tmp_path):
    """The comparison fails when q and k are exchanged: it is not blind to attention."""
    theirs = build("llama")
    theirs.save_pretrained(tmp_path)
    ours = load_folder(tmp_path)
    pieces = model_pieces(ours)
    q, k = (pieces[f"layers.0.attention.{x}_proj.weight"] for x in "qk")
    swapped = q.clone()
    q.copy_(k)
    k.copy_(swapped)
    tokens, _ = tokens_and_weights(ours)
    with pytest.raises(AssertionError, match="logits: relative error"):
        assert_close(ours.logits(ours(tokens)), theirs(tokens).logits, TOLERANCE[torch.float32], "logits")
