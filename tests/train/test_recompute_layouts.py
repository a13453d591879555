"""Recomputation under every kind of parallelism, through `Replica`: the gradients keep their bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config import ParallelConfig, RecomputeConfig
from megalite.data.loader import MicroBatch
from megalite.layers.recompute import FULL, KEEP, Recompute
from megalite.parallel.mesh import Mesh, mesh_of_group
from megalite.parallel.random import initialize
from megalite.train.replica import build_replica
from tests.helpers.kept import Watch
from tests.parallel.layouts import MODELS, packed_batch

MODEL = dataclasses.replace(MODELS["qwen3-tied"], num_layers=4)
BATCHES = [packed_batch(32, seed) for seed in range(4)]
KINDS = (
    RecomputeConfig(kind="none"),
    RecomputeConfig(),
    RecomputeConfig(kind="selective", parts=("norm", "activation", "attention")),
    RecomputeConfig(kind="selective", parts=("mlp",)),
    RecomputeConfig(kind="full"),
)


PASSES = (
    "glu_fwd", "glu_bwd", "glu_bwd_again_",
    "rms_norm_fwd", "rms_norm_residual_fwd", "rms_norm_bwd", "rms_norm_bwd_again",
)  # fmt: skip


def gradients_of(layout: ParallelConfig, kind: RecomputeConfig, batches: list[MicroBatch]) -> list[Tensor]:
    """Gradients of this rank's part of the model after one step, two micro-batches at least."""
    device = torch.device("cpu")
    alone = layout.tp * layout.pp * layout.cp == 1 and layout.zero != 3
    replica = build_replica(
        MODEL,
        layout,
        Mesh(device=device) if alone else mesh_of_group(layout, device),
        dtype=torch.float32,
        micro_batch_tokens=32,
        fill=lambda model: initialize(model, seed=3),
        recompute=kind,
        num_microbatches=len(batches),
    )
    replica.gradients(batches, torch.ones(()))
    replica.state.finish_gradients()
    gradients = [box.tensor.clone() for box in replica.state.boxes("main_grad")]
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    replica.state.release()
    return gradients


def same_bits(layout: ParallelConfig, batches: list[MicroBatch]) -> list[bool]:
    kept, *others = [gradients_of(layout, kind, batches) for kind in KINDS]
    return [all(torch.equal(a, b) for a, b in zip(kept, other, strict=True)) for other in others]


def test_weight_gradients_are_added_once() -> None:
    """Main gradients take what each layer's backward pass adds; a second run of a forward pass adds nothing."""
    assert all(same_bits(ParallelConfig(), BATCHES))


def test_what_costs_next_to_nothing_runs_no_pass_of_its_own() -> None:
    """The backward passes of norms and activations write again what they gave: no forward pass runs twice.

    Where the MLP is made again its norm does, and its activation still does not.
    """
    counts = []
    for kind in (*KINDS[:2], KINDS[3], KINDS[4]):
        watch = Watch()
        with watch:
            gradients_of(ParallelConfig(), kind, BATCHES[:1])
        counts.append({name: watch.calls[f"megalite::{name}"] for name in PASSES})
    layers = MODEL.num_layers
    again = {
        "glu_bwd": -layers,
        "glu_bwd_again_": layers,
        "rms_norm_bwd": -2 * layers,
        "rms_norm_bwd_again": 2 * layers,
    }
    assert counts[1] == {name: count + again.get(name, 0) for name, count in counts[0].items()}
    for count in counts[2:]:
        assert count["rms_norm_residual_fwd"] == counts[0]["rms_norm_residual_fwd"] + layers
        assert [count["glu_fwd"], count["glu_bwd"], count["glu_bwd_again_"]] == [layers, 0, layers]


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2},
        {"tp": 2, "tp_chunks": 2},
        {"cp": 2},
        {"cp": 2, "cp_method": "ulysses"},
        {"pp": 2},
        {"pp": 2, "pp_schedule": "interleaved_zero_bubble"},
        {"pp": 2, "pp_schedule": "zbv"},
        {"pp": 2, "pp_schedule": "dualpipev"},
        {"tp": 2, "pp": 2},
        {"zero": 3},
        {"zero": 3, "tp": 2},
    ],
    ids=lambda layout: "-".join(map(str, layout.values())),
)
def test_same_bits_over_ranks(rank_pool: Any, layout: dict[str, Any]) -> None:
    parallel = ParallelConfig(**layout)
    ranks = parallel.tp * parallel.cp * parallel.pp * (2 if parallel.zero == 3 else 1)
    for same in rank_pool(ranks).run(same_bits, parallel, BATCHES):
        assert all(same)


def test_a_budget_reaches_the_layers() -> None:
    """A budget that only whole layers meet, one for which MLPs do, and one that needs nothing."""
    mlp = Recompute(norm=True, activation=True, mlp=True)
    for budget, choice in ((0.00005, FULL), (0.000128, mlp), (1.0, KEEP)):
        config = RecomputeConfig(kind="budget", budget_gb=budget)
        replica = build_replica(
            MODELS["gpt2"],
            ParallelConfig(),
            Mesh(device=torch.device("cpu")),
            dtype=torch.float32,
            micro_batch_tokens=64,
            fill=lambda model: initialize(model, seed=3),
            recompute=config,
        )
        assert set(replica.model.recompute.values()) == {choice}
