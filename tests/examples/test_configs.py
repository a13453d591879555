"""Every example configuration fits its machines: checks, batch, schedule, and each rank's part on the meta device."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megalite.cli.config_file import parse_pretrain
from megalite.config import ModelConfig, RunConfig
from megalite.models.blocks import ModelPart
from megalite.models.presets import PRESETS
from megalite.models.transformer import Transformer
from megalite.parallel.mesh import Axis
from megalite.parallel.stages import plan_stages
from megalite.parallel.tensor import TensorSplit
from megalite.train.memory_activations import Job
from megalite.train.memory_estimate import estimate_memory
from tests.helpers.runs import ROOT

GPUS = {
    "pretrain_cpu": [1],
    "pretrain_gpt2_124m": [1, 8],
    "pretrain_gpt2_1.5b": [8],
    "pretrain_llama3_8b": [8, 16, 32, 64],
    "pretrain_llama3_70b_64": [64, 128],
    "pretrain_llama3_70b_512": [256, 512],
}
CASES = [pytest.param(name, size, id=f"{name}-{size}") for name, sizes in GPUS.items() for size in sizes]
PARAMETERS = {"gpt2-1.5b": 1_557_611_200, "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496}
"""As the models' own weight files have them."""


def load(name: str) -> RunConfig:
    return parse_pretrain([str(ROOT / "examples" / f"{name}.toml")])[0]


def count(model: Transformer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def job(config: RunConfig, world_size: int) -> Job:
    """The configuration as the memory estimator takes it."""
    train, parallel = config.train, config.parallel
    return Job(
        model=config.model,
        parallel=parallel,
        world_size=world_size,
        tokens=train.micro_batch_size * train.seq_length,
        num_microbatches=train.global_batch_size // train.micro_batch_size // parallel.dp_size(world_size),
        recompute=config.recompute,
        seq_length=train.seq_length,
    )


def rank_model(config: RunConfig, pp_rank: int, tp_rank: int) -> Transformer:
    """What one pipeline and tensor-parallel rank holds, without memory for it."""
    model, parallel = config.model, config.parallel
    plan = plan_stages(model, parallel, config.train.seq_length)
    own = plan.stages_of(pp_rank)
    layers = tuple(layer for stage in own for layer in plan.layers[stage])
    part = ModelPart(layers=layers, embedding=0 in own, head=plan.num_stages - 1 in own)
    split = TensorSplit(Axis(parallel.tp, tp_rank), parallel.tp > 1 and parallel.sequence_parallel)
    return Transformer(model, split, part=part, device="meta")


def replicated(model: ModelConfig) -> int:
    """Elements that every tensor-parallel rank holds whole: norms (the large examples have no biases with tp > 1)."""
    return (2 * model.num_layers + 1) * model.hidden_size


def padding(model: ModelConfig, tp: int) -> int:
    """Rows that make the vocabulary divisible, in the embedding and an untied head."""
    rows = -(-model.padded_vocab_size // tp) * tp - model.vocab_size
    return rows * model.hidden_size * (1 if model.tie_word_embeddings else 2)


@pytest.mark.parametrize(("name", "world_size"), [case for case in CASES if "cpu" not in case.values[0]])
def test_it_fits_80_gb(name, world_size):
    """With a fifth to spare for what the estimate leaves out: fragments, NCCL's buffers, the CUDA context."""
    config = load(name)
    ranks = estimate_memory(job(config, world_size))
    assert max(rank.total for rank in ranks) < 64e9
    held = [count(rank_model(config, pp_rank, 0)) for pp_rank in range(config.parallel.pp)]
    assert held == [rank.parameters for rank in ranks]


@pytest.mark.parametrize("name", [name for name in GPUS if "gpt2_1.5b" in name or "llama3" in name])
def test_the_comments_say_what_the_estimate_is(name):
    """The memory that a comment gives, rounded to GB, for the machines it names first."""
    said = re.search(r"memory_estimate`: (\d+) GB", (ROOT / "examples" / f"{name}.toml").read_text())
    assert said
    world_size = GPUS[name][-1] if name.endswith("_512") else GPUS[name][0]
    ranks = estimate_memory(job(load(name), world_size))
    assert round(max(rank.total for rank in ranks) / 1e9) == int(said[1])


def test_every_configuration_is_tested():
    assert set(GPUS) == {path.stem for path in (ROOT / "examples").glob("*.toml")}


@pytest.mark.parametrize(("name", "world_size"), CASES)
def test_it_fits_the_machines(name, world_size):
    config = load(name)
    train, parallel = config.train, config.parallel
    dp = parallel.dp_size(world_size)
    train.validate_world(dp)
    parallel.validate_microbatches(train.global_batch_size // train.micro_batch_size // dp)
    if config.model.vocab_size:
        parallel.validate_model(config.model)
    tokens = train.micro_batch_size * train.seq_length
    assert tokens % (2 * parallel.cp * parallel.tp) == 0
    assert parallel.tp * parallel.cp <= 8, "what talks at every layer stays inside a machine"
    assert parallel.dp_shard in (0, 8)


@pytest.mark.parametrize("name", [name for name in GPUS if name != "pretrain_cpu"])
def test_the_ranks_hold_the_model_between_them(name):
    config = load(name)
    model, tp, pp = config.model, config.parallel.tp, config.parallel.pp
    total = 0
    for tp_rank in range(tp):
        ranks = [rank_model(config, pp_rank, tp_rank) for pp_rank in range(pp)]
        assert sorted(layer for rank in ranks for layer in rank.part.layers) == list(range(model.num_layers))
        total += sum(map(count, ranks))
    expected = total - padding(model, tp) - (tp - 1) * replicated(model)
    assert expected == count(Transformer(model, device="meta")) - padding(model, 1)
    assert expected == PARAMETERS.get(config.preset, expected)


@pytest.mark.parametrize("name", [name for name in GPUS if name != "pretrain_cpu"])
def test_the_comments_say_what_the_settings_are(name):
    """Numbers that a reader would rely on: steps times tokens, and the layout they were computed for."""
    config, text = load(name), (ROOT / "examples" / f"{name}.toml").read_text()
    train = config.train
    tokens = train.steps * train.global_batch_size * train.seq_length
    said = re.search(r"steps = \d+ +# ([\d.]+) (m|b|tr)illion tokens", text)
    assert said, "the steps' comment gives the tokens"
    unit = {"m": 1e6, "b": 1e9, "tr": 1e12}[said[2]]
    assert abs(tokens / unit - float(said[1])) < 0.06 * max(1.0, float(said[1]) / 10)
    assert config.preset in PRESETS
    assert not Path(config.directory).is_absolute()
