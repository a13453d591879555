"""What patch leaves alone, and what it goes along with."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import megalite_kernels as mk
from megalite_kernels.patching.lazy import LazyLogits
from tests.patch.models import NanoGPT, hugging_face, plain_stack, randomize, tokens
from tests.patch.recorder import Ops, profiled


def state(model: nn.Module) -> dict[str, Any]:
    """Everything a module holds, by identity: classes, parameters, buffers, hooks, attributes."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name} class"] = id(type(module))
        for key, value in vars(module).items():
            inner = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)
            found[f"{name}.{key}"] = value if isinstance(value, (bool, int, float, str)) else inner
    return found


def globals_of(model: nn.Module) -> dict[str, Any]:
    """Identity of every entry of every class and module file behind the model, and of torch's functions."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    files = {sys.modules[cls.__module__] for cls in classes} | {F, torch, nn}
    found = {
        f"{cls} {key}": id(value) for cls in classes for key, value in vars(cls).items() if key != "__dict__"
    }
    for file in files:
        # A module's cache of its own warnings is not the model's.
        found |= {f"{file.__name__} {key}": id(value) for key, value in vars(file).items()}
    registry = getattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS", {})
    return {**found, **{f"attention {key}": id(value) for key, value in dict(registry).items()}}


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "gemma3", "nanogpt", "plain"])
def test_the_round_trip_restores_the_very_same_model(name):
    builders = {"nanogpt": NanoGPT, "plain": plain_stack}
    model = builders[name]() if name in builders else hugging_face(name)
    model.eval()
    inputs = torch.randn(2, 32) if name == "plain" else tokens()
    bystander = copy.deepcopy(model)
    first = output(model, inputs)
    before, outside, keys = state(model), globals_of(model), list(model.state_dict())
    types = [type(module) for module in model.modules()]

    report = mk.patch(model)
    assert report.replaced
    output(model.train(), inputs)
    model.eval()
    assert list(model.state_dict()) == keys
    assert globals_of(bystander) == outside
    assert [type(module) for module in bystander.modules()] == types
    assert torch.equal(output(bystander, inputs), first)
    changed = {key for key, value in state(model).items() if before[key] != value}
    assert all(key.endswith(" class") for key in changed), changed
    assert [type(m).__qualname__ for m in model.modules()] == [cls.__qualname__ for cls in types]
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), types, strict=True))

    assert mk.unpatch(model) > 0
    assert mk.unpatch(model) == 0
    assert state(model) == before
    assert [type(module) for module in model.modules()] == types
    assert torch.equal(output(model, inputs), first)


def output(model: nn.Module, inputs: Tensor) -> Tensor:
    out = model(inputs)
    out = out[0] if isinstance(out, tuple) else getattr(out, "logits", out)
    return out.materialize() if isinstance(out, LazyLogits) else out


def test_patched_undoes_only_its_own_changes():
    model = hugging_face("llama")
    mk.patch(model, ops=["rms_norm"])
    with mk.patched(model) as report:
        assert report.counts() == {"rope": 2, "attention": 2, "swiglu": 2, "linear_cross_entropy": 1}
    assert mk.patch(model, ops=["rms_norm"]).counts() == {}
    assert mk.unpatch(model) == 5
    with pytest.raises(RuntimeError, match="inside"), mk.patched(model):
        raise RuntimeError("inside")
    assert mk.unpatch(model) == 0


def test_copies_and_pickles_keep_the_change():
    model = hugging_face("qwen3").train()
    signature = inspect.signature(model.forward)
    mk.patch(model)
    assert inspect.signature(model.forward) == signature  # trainers look at it
    ids = tokens()
    expected = model(input_ids=ids, labels=ids).loss
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False))
    for other in copies:
        assert [type(a) for a in other.modules()] == [type(a) for a in model.modules()]
        got = other(input_ids=ids, labels=ids)
        assert isinstance(got.logits, LazyLogits)
        assert torch.equal(got.loss, expected)
        got.loss.backward()
        assert all(p.grad is not None for p in other.parameters())
        assert all(p.grad is None for p in model.parameters())
        assert mk.unpatch(other) > 0
    assert mk.unpatch(model) > 0


def test_a_head_may_serve_a_model_and_one_around_it():
    class Around(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def get_output_embeddings(self) -> nn.Module:
            return self.base.get_output_embeddings()

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            return self.base(input_ids=input_ids, labels=labels)

    model = Around(hugging_face("llama")).train()
    ids = tokens()
    expected = model(ids, labels=ids).loss.item()
    assert mk.patch(model, ops="linear_cross_entropy").counts() == {"linear_cross_entropy": 2}
    assert model(ids, labels=ids).loss.item() == pytest.approx(expected, rel=1e-6)
    assert not mk.patch(model, ops="linear_cross_entropy").rows
    assert mk.unpatch(model) == 3


def test_only_what_needs_gradients_gets_them():
    model = hugging_face("llama").train().requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_()
    mk.patch(model)
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "model.embed_tokens.weight"
    ]


def test_save_pretrained_sees_no_difference(tmp_path):
    model = hugging_face("llama-tied")
    model.save_pretrained(tmp_path / "before")
    mk.patch(model)
    model.save_pretrained(tmp_path / "after")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "after").iterdir())
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name


def test_hooks_fire_and_the_check_leaves_no_trace():
    model = hugging_face("llama").train()
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: calls.append(name))
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    # Inside a replaced MLP the activation is no longer called; every other module is.
    expected = [name for name in calls if not name.endswith("act_fn")]
    model.zero_grad(set_to_none=True)
    model.model.layers[0].eval()
    state_before = torch.get_rng_state()
    mk.patch(model)
    assert torch.equal(torch.get_rng_state(), state_before)
    assert all(p.grad is None for p in model.parameters())
    assert not model.model.layers[0].mlp.training
    assert model.model.layers[1].mlp.training
    calls.clear()
    model(input_ids=ids, labels=ids)
    assert calls == expected


def test_the_dtype_may_change_afterwards():
    ids = tokens()
    model = hugging_face("llama").train()
    mk.patch(model)
    model.to(torch.bfloat16)
    loss = model(input_ids=ids, labels=ids).loss
    assert not mk.patch(model).rows
    other = hugging_face("llama").to(torch.bfloat16).train()
    mk.patch(other)
    assert torch.equal(other(input_ids=ids, labels=ids).loss, loss)
    model.to(torch.float64)
    mk.unpatch(other)
    expected = other.to(torch.float64)(input_ids=ids, labels=ids).loss
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "nanogpt"])
def test_autocast(name):
    """Within bf16 rounding of the original, and the same dtype of the loss."""
    torch.manual_seed(0)
    model = (randomize(NanoGPT()) if name == "nanogpt" else hugging_face(name)).train()
    ids = tokens()
    exact = loss_of(model, ids).item()
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_of(model, ids)
    mk.patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, ids)
    assert loss.dtype == expected.dtype
    assert abs(loss.item() - exact) <= 2 * abs(expected.item() - exact) + 2**-10 * exact
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    nano = isinstance(getattr(model, "_orig_mod", model), NanoGPT)
    return model(ids, ids)[1] if nano else model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize(("name", "backend"), [("llama", "eager"), ("nanogpt", "aot_eager")])
def test_compiled_whole_before_and_after(name, backend):
    """fullgraph, the loss without logits, and a model that was compiled first follows patch and unpatch."""
    torch._dynamo.reset()
    model = (NanoGPT() if name == "nanogpt" else hugging_face(name, num_hidden_layers=1)).train()
    ids = tokens()
    expected = loss_of(model, ids)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    loss_of(compiled, ids)
    mk.patch(model)
    loss = loss_of(compiled, ids)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    eager = loss_of(model, ids)
    for got, want in zip(gradients(model, loss), gradients(model, eager), strict=True):
        assert torch.allclose(got, want, atol=1e-6)
    names = profiled(lambda: loss_of(compiled, ids))
    assert {"megalite::attention_fwd", "megalite::linear_cross_entropy_grad"} <= names
    mk.unpatch(model)
    assert not any("megalite" in name for name in profiled(lambda: loss_of(compiled, ids)))
    torch._dynamo.reset()


def gradients(model: nn.Module, loss: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_gradient_checkpointing(name):
    model = hugging_face(name).train()
    ids = tokens()
    mk.patch(model)
    expected = gradients(model, loss_of(model, ids))
    model.activation_checkpointing_enable()
    for got, want in zip(gradients(model, loss_of(model, ids)), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["nanogpt", "gpt2"])
def test_dropout_in_training_takes_the_original_attention(name):
    model = randomize(NanoGPT(dropout=0.2)) if name == "nanogpt" else hugging_face("gpt2", attn_pdrop=0.2)
    report = mk.patch(model.train(), ops=["attention"])
    assert report.counts() == {"attention": 2}
    assert "in training with dropout 0.2" in str(report)
    ids = tokens()
    with Ops() as ops:
        model(ids)
    assert "megalite::attention_fwd" not in ops.names
    with Ops() as ops:
        model.eval()(ids)
    assert ops.names.count("megalite::attention_fwd") == 2


def test_the_report_prints_one_line_for_layers_that_are_alike():
    report = mk.patch(hugging_face("llama"))
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "count", "old", "new", "error"]
    (line,) = [line for line in lines if line.startswith("model.layers.*.mlp ")]
    assert line.split()[1:4] == ["2", "LlamaMLP", "swiglu"]
    assert lines[-1] == (
        "replaced: 2 attention, 1 linear_cross_entropy, 5 rms_norm, 2 rope, 2 swiglu; skipped: 0"
    )
    assert len(lines) == 2 + 7
    assert [row.module for row in report.rows][:2] == ["", "model.layers.0.self_attn"]
    assert str(mk.patch(nn.Linear(2, 2))).endswith("replaced: nothing; skipped: 0")
