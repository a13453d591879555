from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megalite.config import ModelConfig
from megalite.layers.recompute import FULL, Recompute
from megalite.models.presets import preset
from megalite.models.transformer import Transformer
from megalite.parallel.random import initialize
from megalite.train.flops import (
    Peak,
    choose_precision,
    flops_made_again,
    flops_per_token,
    measure_gemm_tflops,
    table_peak_tflops,
)
from megalite.train.metrics import Metrics
from tests.parallel.layouts import MODELS

MLP = Recompute(mlp=True)


OURS = {
    torch.ops.megalite.linear_fwd: lambda x, weight, bias, **_: 2 * math.prod(x) * weight[0],
    torch.ops.megalite.linear_dgrad: lambda dy, weight, **_: 2 * math.prod(dy) * weight[1],
    torch.ops.megalite.linear_weight_grad: lambda dy, x, **_: 2 * math.prod(dy) * x[1],
}
"""FLOPs of our products, of shapes, for torch's counter."""


def products_of(function: Callable[[], Tensor]) -> int:
    """FLOPs that torch's counter sees in products of a forward and backward pass."""
    with FlopCounterMode(display=False, custom_mapping=OURS) as counter:
        function().sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(value for op, value in counts.items() if "mm" in str(op) or op in OURS)


def test_terms_equal_what_a_counter_sees_in_the_matrix_products():
    config = ModelConfig(
        vocab_size=256, num_layers=3, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = Transformer(config)
    initialize(model, 0)
    tokens = torch.randint(0, 256, (2, 32))
    products = products_of(lambda: model.logits(model(tokens)))
    terms = flops_per_token(config, 32).terms
    expected = sum(value for name, value in terms.items() if name != "attention_full") * tokens.numel()
    assert products == expected


@pytest.mark.parametrize(
    ("name", "seq_length", "full", "causal"),
    [("llama3-8b", 8192, 57.92e9, 51.47e9), ("gpt2-124m", 1024, 0.8545e9, 0.7979e9)],
)
def test_known_models(name, seq_length, full, causal):
    flops = flops_per_token(preset(name), seq_length)
    assert flops.full == pytest.approx(full, rel=2e-3)
    assert flops.causal == pytest.approx(causal, rel=2e-3)


@pytest.mark.parametrize("name", ["qwen3-tied", "gpt2"])
@pytest.mark.parametrize(
    "choice", [Recompute(norm=True, activation=True, attention=True), MLP, FULL], ids=str
)
def test_what_is_made_again_is_what_torch_counts(name, choice):
    """The products of a backward pass beyond those of one that makes nothing again."""
    config = dataclasses.replace(MODELS[name], num_layers=3)
    model = Transformer(config)
    initialize(model, 0)
    tokens, counted = torch.randint(0, 256, (2, 32)), []
    for choices in ({}, {0: choice, 2: choice}):
        model.recompute = choices
        counted.append(products_of(lambda: model.logits(model(tokens))))
    again = flops_made_again(config, 32, {0: choice, 2: choice})
    products = sum(value for term, value in again.items() if term != "attention_full")
    assert counted[1] - counted[0] == products * tokens.numel()
    assert (
        again.get("attention_full", 0)
        == choice.full * 2 * 4 * 32 * config.num_attention_heads * config.size_per_head
    )
    assert bool(again) == (choice.mlp or choice.full)


def test_hfu_counts_what_is_made_again():
    flops = flops_per_token(preset("gpt2-124m"), 1024)
    flops.again.update(flops_made_again(preset("gpt2-124m"), 1024, dict.fromkeys(range(12), FULL)))
    peak = Peak(1e15, 2e15)
    # Everything forward but down_proj, a third of each product's FLOPs.
    terms = flops.terms
    layers = (terms["attention_qkv"] + terms["attention_output"] + terms["mlp"] / 2) / 3
    for causal in (False, True):
        attention = terms["attention_full"] / 3 / (1 + causal)
        assert flops.ideal_seconds_again(peak, causal=causal) == pytest.approx((layers + attention) / 1e15)
    plain = flops_per_token(preset("gpt2-124m"), 1024)
    seen, usual = (
        Metrics(None, counted, peak=peak, num_devices=1, device=torch.device("cpu")).utilisation(1e5)
        for counted in (flops, plain)
    )
    assert usual.keys() == {"mfu_causal", "mfu_full"}
    assert {name: seen[name] for name in usual} == usual
    assert seen["hfu_causal"] == pytest.approx(
        1e5 * (flops.causal / 1e15 + (layers + terms["attention_full"] / 6) / 1e15)
    )
    assert seen["hfu_full"] > seen["mfu_full"]


def test_a_window_bounds_attention():
    wide = flops_per_token(ModelConfig(vocab_size=128), 256).terms
    narrow = flops_per_token(ModelConfig(vocab_size=128, sliding_window=64), 256).terms
    assert narrow["attention_full"] * 4 == wide["attention_full"]


def test_gemm_peak_is_measured_and_positive():
    assert 1e-3 < measure_gemm_tflops(torch.device("cpu"), torch.float32, budget_s=0.2) < 1e3


def test_an_unknown_device_has_no_table_peak():
    assert table_peak_tflops(torch.device("cpu")) is None


@pytest.mark.parametrize("requested", ["bf16", "fp32"])
def test_a_requested_precision_is_kept(requested):
    precision = choose_precision(requested, torch.device("cpu"))
    assert precision.chosen == requested
    assert precision.reason == "as configured"


def test_auto_follows_the_measurement():
    precision = choose_precision("auto", torch.device("cpu"))
    faster = precision.gemm_bf16_tflops >= 1.2 * precision.gemm_fp32_tflops
    assert precision.chosen == ("bf16" if faster else "fp32")
    assert precision.gemm_peak_tflops == max(
        precision.gemm_bf16_tflops if faster else 0.0, precision.gemm_fp32_tflops if not faster else 0.0
    )
