"""Weights quantised once a step, and inputs where they are made: the same bits with fewer launches, in any layout."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config import ModelConfig, ParallelConfig, RecomputeConfig
from megalite.data.loader import MicroBatch
from megalite.layers.linear import use_fp8
from megalite.parallel.fp8_weights import get_copies, quantized_once
from megalite.train.memory_estimate import layer_copies
from megalite.train.replica import Replica
from megalite_kernels import backend
from megalite_kernels.ops.fp8_linear import QuantizedWeight
from tests.models.test_compiled import batch
from tests.parallel.layouts import MODELS
from tests.parallel.replicas import make_replica, parts_of
from tests.parallel.training import descend

LAYERS, MICRO_BATCHES, TOKENS = 2, 3, 32
STARTS = [(0, 5, 6, 19), (0,), (0, 16)]
RECOMPUTE = {
    "none": RecomputeConfig(),
    "selective": RecomputeConfig(kind="selective", parts=("attention", "norm", "activation")),
    "mlp": RecomputeConfig(kind="selective", parts=("mlp",)),
    "full": RecomputeConfig(kind="full"),
}


ALONE = ParallelConfig()


def model_of(name: str, layers: int = LAYERS) -> ModelConfig:
    return dataclasses.replace(MODELS[name], num_layers=layers)


def batches_of(step: int, rank: int = 0) -> list[MicroBatch]:
    return [batch(starts, 100 * rank + 10 * step + number) for number, starts in enumerate(STARTS)]


def run(
    name: str,
    layout: ParallelConfig = ALONE,
    *,
    fused: bool = True,
    copies: bool = True,
    layers: int = LAYERS,
    **more: Any,
) -> tuple[list[Tensor], Counter[str]]:
    """Losses, gradients, weights, and scores of another batch after each step; launches of the last step by raw op."""
    replica = make_replica(layout, model_of(name, layers), torch.bfloat16, TOKENS, **more)
    if not fused:
        unfuse(replica)
    replica.fp8_copies = copies
    assert bool(replica._fp8_copies) == ("fp8" in more and not replica.gathers_weights)
    seen = []
    for step in range(2):
        with backend.recording() as record:
            seen.append(replica.gradients(batches_of(step, replica.mesh.dp.rank), torch.tensor(1 / 64)))
        replica.state.finish_gradients()
        seen += [part.value for part in parts_of(replica, "main_grad")]
        with torch.no_grad():
            descend(replica.state, step)
        if replica.pipeline is None:
            seen.append(replica.token_losses(batch((0, 9), 77)))
    seen += [part.value for part in parts_of(replica, "master")]
    replica.state.release()
    return seen, Counter(choice.op for choice in record)


def unfuse(replica: Replica) -> None:
    """Norms and activations write 16 bits only, and every projection quantises what it reads."""
    for module in replica.model.modules():
        for name in getattr(module, "feeds_projections", ()):
            getattr(module, name).quantizes = False


def made_of(weight: Tensor) -> QuantizedWeight | None:
    copies = get_copies(weight)
    assert copies is not None
    return copies.made


def assert_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(
    ("name", "scaling"), [("llama", "rowwise"), ("gpt2", "rowwise"), ("llama", "tensorwise")]
)
def test_copies_and_fusion_change_no_bit(name: str, scaling: str, recompute: str) -> None:
    """Two steps of three micro-batches and validation after each, against every product quantising for itself."""
    more = {"fp8": scaling, "recompute": RECOMPUTE[recompute]}
    ours, _ = run(name, **more)
    theirs, _ = run(name, fused=False, copies=False, **more)
    assert_bits(ours, theirs)
    assert not torch.equal(ours[-1], run(name, recompute=RECOMPUTE[recompute])[0][-1])


@pytest.mark.parametrize(
    ("name", "norm", "activation"), [("llama", "rms", "glu"), ("gpt2", "layer", "activation")]
)
def test_launches_of_a_step(name: str, norm: str, activation: str) -> None:
    """Of each layer's four inputs three are quantised where they are made, and each weight once each way."""
    _, ours = run(name, fp8="rowwise")
    _, plain = run(name, fp8="rowwise", fused=False, copies=False)
    passes = LAYERS * MICRO_BATCHES
    assert plain["fp8_quantize_rows"] == passes * (4 + 4 + 4)  # inputs, weights, gradients
    assert plain["fp8_quantize_columns"] == passes * 4
    assert ours["fp8_quantize_rows"] == passes * (1 + 4) + LAYERS * 4
    assert ours["fp8_quantize_columns"] == LAYERS * 4
    fused = {op: count for op, count in ours.items() if op.startswith("fp8_") and op.endswith("_fwd")}
    assert fused == {
        f"fp8_{norm}_norm_fwd": MICRO_BATCHES,  # the first layer's, which has no residual
        f"fp8_{norm}_norm_residual_fwd": 2 * passes - MICRO_BATCHES,
        f"fp8_{activation}_fwd": passes,
    }
    assert ours[f"{norm}_norm_residual_fwd"] == MICRO_BATCHES  # the final norm
    assert ours[f"{activation}_fwd"] == 0
    fewer = passes * 3 + LAYERS * (MICRO_BATCHES - 1) * 8
    assert sum(plain.values()) - sum(ours.values()) == fewer


def test_one_micro_batch_keeps_nothing() -> None:
    replica = make_replica(ALONE, model_of("llama"), torch.bfloat16, TOKENS, fp8="rowwise")
    weights = [weight for weight in replica.model.parameters() if get_copies(weight) is not None]
    assert len(weights) == 4 * LAYERS
    tokens = batches_of(0)[0]
    for uses in (1, 2):
        with quantized_once(replica._fp8_copies, uses):
            replica.model.loss(*(x[None] for x in (tokens.tokens, tokens.labels))).backward()
            kept = [made_of(weight) for weight in weights]
            assert [made is not None for made in kept] == [uses > 1] * len(weights)
            sizes = sum(x.nbytes for made in kept if made is not None for pair in made for x in pair)
        elements = sum(weight.numel() for weight in weights)
        scales = 4 * sum(sum(weight.shape) for weight in weights)
        assert sizes == (2 * elements + scales if uses > 1 else 0)
        assert uses == 1 or sizes == LAYERS * layer_copies(model_of("llama"))
        assert not any(made_of(weight) for weight in weights)


def test_copies_end_with_a_failed_step() -> None:
    replica = make_replica(ALONE, model_of("llama"), torch.bfloat16, TOKENS, fp8="rowwise")
    copies = next(found for w in replica.model.parameters() if (found := get_copies(w)) is not None)

    def fail() -> None:
        with quantized_once(replica._fp8_copies, 2):
            assert copies.live
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not copies.live


@pytest.mark.slow
def test_compiled_blocks_read_copies_too() -> None:
    ours, launches = run("llama", fp8="rowwise", compile_backend="aot_eager")
    assert launches["fp8_quantize_columns"] == LAYERS * 4
    assert_bits(ours, run("llama", fp8="rowwise")[0])


def ranks_job(
    name: str, layout: ParallelConfig, more: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor], int]:
    ours, launches = run(name, layout, **more)
    theirs, _ = run(name, layout, fused=False, copies=False, **more)
    return ours, theirs, launches["fp8_quantize_columns"]


@pytest.mark.parametrize(
    ("layout", "columns"),
    [
        ({"tp": 2}, 4 * LAYERS),
        ({"tp": 2, "sequence_parallel": False}, 4 * LAYERS),
        ({"zero": 1, "bucket_size": 3000}, 4 * LAYERS),
        ({"pp": 2}, 4 * LAYERS // 2),
        ({"pp": 2, "pp_schedule": "zbv"}, 4 * LAYERS),
        ({"zero": 3}, 4 * LAYERS * MICRO_BATCHES),
    ],
    ids=str,
)
def test_two_ranks(rank_pool: Any, layout: dict[str, Any], columns: int) -> None:
    """New weights travel while a step begins: a copy is made after they have come. ZeRO-3 keeps none."""
    config = ParallelConfig(**layout)
    layers = LAYERS * config.stages_per_rank
    answers = rank_pool(2).run(ranks_job, "llama", config, {"fp8": "rowwise", "layers": layers})
    for ours, theirs, launched in answers:
        assert_bits(ours, theirs)
        assert launched == columns


def test_plain_models_have_no_copies() -> None:
    replica = make_replica(ALONE, model_of("llama"), torch.bfloat16, TOKENS, fp8="rowwise")
    assert any(
        norm.quantizes for norm in (replica.model.layers[0].attention_norm, replica.model.layers[1].mlp_norm)
    )
    assert not replica.model.final_norm.quantizes
    use_fp8(replica.model, None)
    assert not replica.model.layers[0].attention_norm.quantizes
    assert not replica.model.layers[0].mlp.activation.quantizes
    bf16 = make_replica(ALONE, model_of("llama"), torch.bfloat16, TOKENS)
    assert all(get_copies(weight) is None for weight in bf16.model.parameters())
