"""Each covered family: how many modules are replaced, and that nothing else about the model changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megalite_kernels as mk
from megalite_kernels.patching.lazy import LazyLogits
from megalite_kernels.testing import assert_as_accurate
from tests.patch.models import (
    FAMILIES,
    PLAIN_COUNTS,
    NanoGPT,
    hugging_face,
    nano_counts,
    plain_stack,
    randomize,
    tokens,
)
from tests.patch.recorder import Ops

LOOSE = 3e-5  # of the largest value, fp32: two layers of sums in another order; 1e-6 to 5e-6 measured


def nano() -> nn.Module:
    torch.manual_seed(0)
    return randomize(NanoGPT())


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda name=name: hugging_face(name)) for name in FAMILIES},
    "nanogpt": nano,
}
COUNTS = {**{name: family.counts() for name, family in FAMILIES.items()}, "nanogpt": nano_counts()}


def run(model: nn.Module, ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(logits, loss) of a model of either style; logits as a tensor."""
    if isinstance(model, NanoGPT):
        shifted = None if labels is None else torch.cat((labels[:, 1:], labels.new_full((2, 1), -100)), 1)
        logits, loss = model(ids, None if shifted is None else torch.where(shifted == -100, -1, shifted))
    else:
        output = model(input_ids=ids, labels=labels)
        logits, loss = output.logits, output.loss
    return (logits.materialize() if isinstance(logits, LazyLogits) else logits), loss


def results(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Logits, loss and every gradient of a training step with some ignored labels."""
    model.to(dtype).train()
    ids = tokens()
    labels = ids.clone()
    labels[0, 3:6] = -100
    logits, loss = run(model, ids, labels)
    loss.backward()
    found = {"logits": logits.detach(), "loss": loss.detach()}
    found |= {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each within LOOSE of its largest value; a gradient that is zero but for rounding on the scale of the others."""
    largest = max(x.abs().max().item() for name, x in expected.items() if name not in ("logits", "loss"))
    for name, want in expected.items():
        scale = max(want.abs().max().item(), 0.0 if name in ("logits", "loss") else 1e-2 * largest)
        gap = (got[name] - want).abs().max().item()
        assert gap <= LOOSE * scale, f"{name}: {gap:.2e} of {scale:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_the_exact_number_of_modules_is_replaced(name):
    model = MODELS[name]()
    report = mk.patch(model)
    assert report.counts() == COUNTS[name]
    assert all("gelu" in row.skipped for row in report.skipped), report
    assert all(row.error is not None and row.error < 2e-5 for row in report.replaced)
    assert not mk.patch(model).replaced  # a second time there is nothing to do


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_every_gradient_match(name):
    model = MODELS[name]()
    expected = results(model)
    mk.patch(model)
    assert_close(results(model), expected)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_as_near_to_float64_as_the_original(name):
    """Error of the patched model at most twice the unpatched one's, both in bf16 (see `assert_as_accurate`)."""
    model = MODELS[name]().to(torch.bfloat16)
    truth = results(MODELS[name]().to(torch.bfloat16), torch.float64)
    expected = results(model, torch.bfloat16)
    report = mk.patch(model)
    assert report.counts() == COUNTS[name]
    got = results(model, torch.bfloat16)
    largest = max(x.abs().max().item() for name, x in truth.items() if name not in ("logits", "loss"))
    # The loss is float32, of hidden states in bf16: it differs by their rounding, averaged over the tokens.
    loss, theirs, true = (x.pop("loss").double() for x in (got, expected, truth))
    assert abs(loss - true) <= 2 * abs(theirs - true) + 2**-12 * true
    for key, true in truth.items():
        magnitude = 0.1 * largest if key not in ("logits", "loss") else 0.0
        assert_as_accurate(got[key], expected[key], true, floor=2.0, magnitude=magnitude, name=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_a_cache_gives_the_same_tokens(name):
    model = hugging_face(name).eval()
    ids = tokens()
    mask = torch.ones_like(ids)
    padded = mask.clone()
    padded[0, :4] = 0
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}
    expected = [model.generate(ids, attention_mask=m, **options) for m in (mask, padded)]
    with mk.patched(model):
        for m, want in zip((mask, padded), expected, strict=True):
            assert torch.equal(model.generate(ids, attention_mask=m, **options), want)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_other_ways_to_generate(name):
    """A static cache (keys longer than what was written), beams, and a prompt given in two parts."""
    model = hugging_face(name).eval()
    ids = tokens()
    ways: list[dict[str, Any]] = [
        {"cache_implementation": "static", "disable_compile": True},
        {"num_beams": 3},
    ]
    expected = [model.generate(ids, max_new_tokens=6, do_sample=False, **way) for way in ways]
    with torch.no_grad():
        logits = model(ids).logits
    mk.patch(model)
    for way, want in zip(ways, expected, strict=True):
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, **way), want)
    with torch.no_grad(), Ops() as ops:
        first = model(ids[:, :5], use_cache=True)
        # transformers 5.24 renames the argument from past_key_values.
        cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        kept = first["cache"] if "cache" in first else first["past_key_values"]
        second = model(ids[:, 5:], **{cache_name: kept}, use_cache=True)
    assert torch.allclose(second.logits, logits[:, 5:], atol=1e-5)
    assert ops.names.count("megalite::attention_fwd") == 4


def test_packed_documents_do_not_leak():
    """Positions that start again make Hugging Face mask the documents from one another."""
    model = hugging_face("llama").eval()
    ids = tokens(1)
    positions = torch.cat((torch.arange(6), torch.arange(7)))[None]
    expected = model(ids, position_ids=positions, use_cache=False).logits
    mk.patch(model)
    got = model(ids, position_ids=positions, use_cache=False).logits
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.allclose(got[:, 6:], model(ids[:, 6:]).logits, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padding_mask_is_respected(name, side):
    model = hugging_face(name).eval()
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, : 4 if side == "left" else None] = 0
    if side == "right":
        mask[0, :9] = 1
    expected = model(ids, attention_mask=mask).logits
    mk.patch(model)
    with Ops() as ops:
        got = model(ids, attention_mask=mask).logits
    assert torch.allclose(got[mask.bool()], expected[mask.bool()], atol=1e-5)
    assert "megalite::attention_fwd" not in ops.names
    with Ops() as ops:
        model(ids, attention_mask=torch.ones_like(ids))
    assert ops.names.count("megalite::attention_fwd") == 2


@pytest.mark.parametrize("name", MODELS)
def test_training_makes_no_logits(name):
    """No op gives a tensor of T x V; without the patch several do."""
    model = MODELS[name]().train()
    ids = tokens(2, 60)  # more tokens than the hidden size, so that logits are larger than the head's weight
    labels = ids.clone()
    with Ops(97) as ops:
        run_training(model, ids, labels)
    assert ops.largest >= 120 * 97
    mk.patch(model)
    with Ops(97) as ops:
        run_training(model, ids, labels)
    assert ops.largest < 120 * 97
    assert "megalite::linear_cross_entropy_grad" in ops.names


def run_training(model: nn.Module, ids: Tensor, labels: Tensor) -> None:
    loss = model(ids, labels)[1] if isinstance(model, NanoGPT) else model(input_ids=ids, labels=labels).loss
    loss.backward()


def test_no_allocation_is_as_large_as_the_logits():
    """Inside the ops too: the largest single allocation of a training step, as the profiler saw it."""
    model = hugging_face("llama", vocab_size=1031, num_hidden_layers=1, max_position_embeddings=600).train()
    ids = tokens(4, 600, 1031)

    def largest() -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            model(input_ids=ids, labels=ids).loss.backward()
        return max(event.self_cpu_memory_usage for event in profile.events())

    logits_bytes = 4 * 600 * 1031 * 4
    assert largest() >= logits_bytes
    mk.patch(model)
    assert largest() < logits_bytes


def test_plain_modules():
    model = plain_stack()
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(3))
    expected = model(x)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    report = mk.patch(model)
    assert report.counts() == PLAIN_COUNTS
    assert not report.skipped
    got = model(x)
    got.square().sum().backward()
    assert torch.allclose(got, expected, atol=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, gradients[name], rtol=1e-4, atol=1e-4 * gradients[name].abs().max())


@pytest.mark.parametrize("key", ["num_items_in_batch", "shift_labels", "ignore_index"])
def test_the_models_own_loss_options_are_followed(key):
    model = hugging_face("gemma2").train()  # with a soft-cap on the logits
    ids = tokens()
    labels = ids.clone()
    if key != "ignore_index":
        labels[0, :5] = -100
    options: dict[str, Any] = {
        "num_items_in_batch": {"num_items_in_batch": torch.tensor(37)},
        "shift_labels": {"shift_labels": labels.roll(-1, 1)},
        "ignore_index": {"ignore_index": int(ids[1, 4])},
    }[key]
    expected = model(input_ids=ids, labels=labels, **options).loss
    plain = model(input_ids=ids, labels=labels).loss
    assert abs(expected.item() - plain.item()) > 1e-3  # the option matters here
    mk.patch(model)
    assert model(input_ids=ids, labels=labels, **options).loss.item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_logits_are_tensors_in_eval_mode_and_without_labels():
    model = hugging_face("llama").eval()
    ids = tokens()
    expected = model(input_ids=ids, labels=ids)
    mk.patch(model)
    got = model(input_ids=ids, labels=ids)
    assert isinstance(got.logits, Tensor)
    assert torch.allclose(got.logits, expected.logits, atol=1e-5)
    assert isinstance(model.train()(input_ids=ids).logits, Tensor)
    assert model.train()(input_ids=ids, labels=ids, return_dict=False)[0].item() == pytest.approx(
        expected.loss.item()
    )
