from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import megalite_kernels
from megalite.config import IGNORE_INDEX, ParallelConfig, RunConfig, TrainConfig
from megalite.config_values import to_dict
from megalite.data.loader import MicroBatch
from megalite.errors import DivergedError, ExitCode, UserError
from megalite.parallel.gradients import get_sink
from megalite.parallel.mesh import Mesh, mesh_of_group
from megalite.train.replay import replay
from megalite.train.run import run_pretraining
from megalite.train.runlog import read_records
from megalite.train.setup import Session, build_session, check_same_run
from megalite.train.trainer import Trainer
from tests.helpers.tiny import cheap_surroundings, make_dataset, read_losses, tiny_config

CPU = Mesh(device=torch.device("cpu"))


def ranks_mesh() -> Mesh:
    """All of the pool's ranks along dp."""
    return mesh_of_group(ParallelConfig(), torch.device("cpu"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(autouse=True)
def _surroundings(request: pytest.FixtureRequest) -> Iterator[None]:
    """One test keeps the costly ones."""
    whole = request.node.get_closest_marker("whole") is not None
    with contextlib.nullcontext() if whole else cheap_surroundings():
        yield


def train(config: RunConfig, mesh: Mesh = CPU) -> dict:
    outcome = run_pretraining(config, mesh, command="test", config_toml=lambda config: "")
    assert outcome.code is ExitCode.DONE
    return outcome.result


def session_for(config: RunConfig, mesh: Mesh = CPU) -> Session:
    with cheap_surroundings():  # in a rank's process too
        return build_session(config, mesh)


def gradients(trainer: Trainer) -> list[tuple[str, tuple[slice, ...], torch.Tensor]]:
    """The blocks of the gradients that this process updates: tensor, place in it, values."""
    boxes = trainer.state.boxes("main_grad")
    return [(box.piece.name, box.index, box.tensor.clone()) for box in boxes]


@pytest.mark.whole
def test_a_run_learns_and_leaves_everything_behind(dataset, tmp_path):
    config = tiny_config(dataset, tmp_path / "run", train={"steps": 40, "log_interval": 7})
    result = train(config)
    losses = read_losses(tmp_path / "run")
    assert sorted(losses) == list(range(1, 41))
    assert losses[1] == pytest.approx(math.log(300), rel=0.02)
    assert losses[40] < 0.75 * losses[1]
    evals = read_records(tmp_path / "run/evals.jsonl")
    assert [record["step"] for record in evals] == [6, 12, 18, 24, 30, 36, 40]
    assert evals[-1]["complete"]
    assert set(evals[-1]["sources"]) == {"even", "odd"}
    assert evals[-1]["samples"][0]["new_tokens"] > 0
    assert result["steps"] == 40
    assert result["val_bits_per_byte"] == evals[-1]["val_bits_per_byte"]
    assert result["tokens_per_s"] > 0
    assert 0 < result["mfu_causal"] < result["mfu_full"] < 1
    for name in ("run.json", "config.toml", "baselines.json", "result.json", "report.html", "events.jsonl"):
        assert (tmp_path / "run" / name).exists(), name
    assert list((tmp_path / "run/tensorboard").iterdir())
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2


def test_bits_per_byte_of_sources_add_up_to_the_whole(dataset, tmp_path):
    train(tiny_config(dataset, tmp_path / "run"))
    last = read_records(tmp_path / "run/evals.jsonl")[-1]
    bits = sum(s["bits_per_byte"] * s["bytes"] for s in last["sources"].values())
    assert bits / last["val_bytes"] == pytest.approx(last["val_bits_per_byte"], rel=1e-12)
    nats = last["val_loss"] * last["val_tokens"] / math.log(2)
    assert nats / last["val_bytes"] == pytest.approx(last["val_bits_per_byte"], rel=1e-12)


def test_a_finished_run_is_left_as_it_is(dataset, tmp_path):
    config = tiny_config(dataset, tmp_path / "run")
    train(config)
    before = (tmp_path / "run/metrics.jsonl").read_text()
    assert train(config)["steps"] == 12
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_a_longer_run_continues_with_the_same_data(dataset, tmp_path):
    """With a schedule that does not look at the run's length, more steps repeat the shorter run's losses."""
    constant = {"kind": "constant", "warmup": 3}
    train(tiny_config(dataset, tmp_path / "run", train={"steps": 7}, schedule=constant))
    short = read_losses(tmp_path / "run")
    longer = tiny_config(dataset, tmp_path / "run", train={"steps": 12}, schedule=constant)
    train(longer)
    train(dataclasses.replace(longer, run_dir=str(tmp_path / "other")))
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "other")
    assert {s: loss for s, loss in read_losses(tmp_path / "run").items() if s <= 7} == short


def test_micro_batch_size_changes_nothing_but_rounding(dataset, tmp_path):
    for size in (1, 4, 8):
        train(tiny_config(dataset, tmp_path / str(size), train={"micro_batch_size": size}))
    losses = [read_losses(tmp_path / str(size)) for size in (1, 4, 8)]
    for step in losses[0]:
        assert losses[1][step] == pytest.approx(losses[0][step], rel=1e-5)
        assert losses[2][step] == pytest.approx(losses[0][step], rel=1e-5)


def mask_unevenly(batches: list[MicroBatch], keep: list[int]) -> list[MicroBatch]:
    """Give each micro-batch its own number of valid labels."""
    masked = []
    for batch, count in zip(batches, keep, strict=True):
        labels = batch.labels.clone()
        labels[count:] = IGNORE_INDEX
        masked.append(dataclasses.replace(batch, labels=labels))
    return masked


def test_loss_is_the_sum_over_valid_tokens_divided_by_their_number(dataset, tmp_path):
    """Contract: never a mean of means. Micro-batches of 3, 40, 64 and 1 valid tokens weigh as they should."""
    session = session_for(tiny_config(dataset, tmp_path / "run"))
    trainer = session.trainer
    batches = mask_unevenly(trainer.load(0), [3, 40, 64, 1])
    with torch.no_grad():
        sums = [
            trainer.model.loss(
                b.tokens, b.labels, positions=b.positions, cu_seqlens=b.cu_seqlens, max_seqlen=b.max_seqlen
            ).item()
            for b in batches
        ]
    counts = [int((b.labels != IGNORE_INDEX).sum()) for b in batches]
    trainer.load = lambda step: batches  # type: ignore[method-assign]
    result, _ = trainer.train_step(0, session.stop)
    assert result.valid_tokens == sum(counts)
    assert result.loss.item() == pytest.approx(sum(sums) / sum(counts), rel=1e-6)
    mean_of_means = sum(s / c for s, c in zip(sums, counts, strict=True)) / len(sums)
    assert abs(result.loss.item() - mean_of_means) > 1e-3, "the case must tell the two apart"


def one_masked_step(config: RunConfig, keep: list[int]) -> tuple[float, float, list]:
    """Runs on each rank: loss, gradient norm and gradients of step 0 with uneven masks (by global micro-batch)."""
    mesh = ranks_mesh() if dist.is_initialized() else CPU
    world, rank = mesh.world_size, mesh.rank
    session = session_for(dataclasses.replace(config, run_dir=f"{config.run_dir}-{world}"), mesh)
    trainer = session.trainer
    batches = mask_unevenly(trainer.load(0), keep[rank::world])
    trainer.load = lambda step: batches  # type: ignore[method-assign]
    result, _ = trainer.train_step(0, session.stop)
    trainer.loader.close()
    return result.loss.item(), result.grad_norm.item(), gradients(trainer)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_unequal_masks_equal_one_process(dataset, tmp_path, rank_pool, world):
    """Contract: the sum over valid tokens holds across ranks, for the loss, every gradient and the norm."""
    config = tiny_config(dataset, tmp_path / "run")
    keep = [3, 40, 64, 1]
    loss, norm, blocks = one_masked_step(config, keep)
    grads = {name: grad for name, _, grad in blocks}
    largest = max(grad.abs().max() for grad in grads.values())
    seen = 0
    for got_loss, got_norm, got in rank_pool(world).run(one_masked_step, config, keep):
        assert got_loss == pytest.approx(loss, rel=1e-6)
        assert got_norm == pytest.approx(norm, rel=1e-5)
        for name, index, grad in got:
            assert (grads[name][index] - grad).abs().max() <= 1e-5 * largest, name
            seen += grad.numel()
    assert seen == sum(grad.numel() for grad in grads.values())


def run_on_rank(config: RunConfig) -> int:
    mesh = ranks_mesh()
    with cheap_surroundings():
        return run_pretraining(config, mesh, command="test", config_toml=lambda config: "").code


@pytest.mark.parametrize("world", [2, 4])
def test_data_parallel_losses_equal_one_process(dataset, tmp_path, rank_pool, world):
    """20 steps in fp32: the same data in the same order, and losses equal to 1e-5."""
    config = tiny_config(dataset, tmp_path / "one", train={"steps": 20})
    train(config)
    codes = rank_pool(world).run(run_on_rank, dataclasses.replace(config, run_dir=str(tmp_path / "many")))
    assert set(codes) == {ExitCode.DONE}
    one, many = read_losses(tmp_path / "one"), read_losses(tmp_path / "many")
    assert one.keys() == many.keys()
    for step in one:
        assert many[step] == pytest.approx(one[step], rel=1e-5), step
    last = [read_records(tmp_path / name / "evals.jsonl")[-1] for name in ("one", "many")]
    assert last[1]["val_tokens"] == last[0]["val_tokens"]
    assert last[1]["val_bits_per_byte"] == pytest.approx(last[0]["val_bits_per_byte"], rel=1e-5)


def stop_on_rank_one(config: RunConfig) -> int:
    """A signal that only one rank received, after step 3: the step at which this rank stopped."""
    rank = dist.get_rank()
    mesh = ranks_mesh()
    session = session_for(config, mesh)

    def receive(step: int) -> None:
        if step == 3 and rank == 1:
            session.stop.name = "SIGTERM"

    assert not session.trainer.train(session.stop, receive)
    session.saver.wait()
    session.trainer.loader.close()
    return session.trainer.completed_steps


def test_all_ranks_stop_at_the_same_step_when_one_is_signalled(dataset, tmp_path, rank_pool):
    config = tiny_config(dataset, tmp_path / "run", checkpoint={"interval": 0})
    stopped = rank_pool(2).run(stop_on_rank_one, config)
    assert stopped[0] == stopped[1] < 12
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [f"step_{stopped[0]:08d}"]


def test_a_batch_ramp_takes_its_samples_in_order_and_resumes(dataset, tmp_path):
    ramp = {"rampup_start": 2, "rampup_steps": 8, "steps": 12}
    config = tiny_config(dataset, tmp_path / "run", train=ramp)
    train(config)
    records = read_records(tmp_path / "run/metrics.jsonl")
    assert [r["global_batch_size"] for r in records] == [2, 2, 2, 4, 4, 4, 6, 6, 8, 8, 8, 8]
    assert [r["valid_tokens"] for r in records] == [r["global_batch_size"] * 32 for r in records]
    assert records[-1]["tokens"] == sum(r["global_batch_size"] * 32 for r in records)
    losses = read_losses(tmp_path / "run")
    shutil.rmtree(max((tmp_path / "run/checkpoints").iterdir()))
    train(config)
    assert read_losses(tmp_path / "run") == losses


def test_a_profile_is_written(dataset, tmp_path):
    train(tiny_config(dataset, tmp_path / "run", train={"profile": True}))
    events = json.loads((tmp_path / "run/trace.json").read_text())["traceEvents"]
    assert any("mm" in event.get("name", "") for event in events)


def poison(trainer: Trainer, steps: set[int], value: float = math.nan) -> None:
    """Make one weight's gradient non-finite in some (0-based) steps."""
    original = trainer.load

    def load(step: int) -> list[MicroBatch]:
        batches = original(step)
        trainer.model.poisoned = step in steps  # type: ignore[assignment]
        return batches

    weight = trainer.model.layers[1].mlp.gate_up_proj.weight
    sink = get_sink(weight)
    add = sink.add
    sink.add = lambda dy, x: add(dy * value if trainer.model.poisoned else dy, x)  # type: ignore[method-assign]
    trainer.load = load  # type: ignore[method-assign]


def test_a_non_finite_step_is_skipped_counted_and_named(dataset, tmp_path):
    """Contract: the update is dropped by selection; weights, moments and the counter stay bit for bit."""
    session = session_for(tiny_config(dataset, tmp_path / "run"))
    trainer = session.trainer
    poison(trainer, {2})
    for step in range(2):
        trainer.train_step(step, session.stop)

    def state() -> list[torch.Tensor]:
        shards = trainer.state.optimizer_shards()
        return [t.clone() for s in shards for t in (s.weights, s.values, s.exp_avg, s.exp_avg_sq)]

    before, count = state(), trainer.optimizer.step_count.clone()
    result, _ = trainer.train_step(2, session.stop)
    assert result.verdict.skip
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert torch.equal(count, trainer.optimizer.step_count)
    trainer.metrics.add(result)
    trainer.flush()
    event = read_records(tmp_path / "run/events.jsonl")[-1]
    assert (event["kind"], event["step"], event["rank"]) == ("skip", 3, 0)
    assert event["parameter"] == "layers.1.mlp.gate_proj.weight"
    result, _ = trainer.train_step(3, session.stop)
    assert not result.verdict.skip
    assert all(torch.isfinite(t).all() for t in state())
    trainer.loader.close()


def poison_rank_one(config: RunConfig) -> list[dict]:
    """Step 3 goes bad on rank 1 alone; returns what this rank's log says (only the first rank has one)."""
    rank = dist.get_rank()
    mesh = ranks_mesh()
    session = session_for(config, mesh)
    poison(session.trainer, {2} if rank == 1 else set())
    for step in range(4):
        session.trainer.metrics.add(session.trainer.train_step(step, session.stop)[0])
    session.trainer.flush()
    session.trainer.loader.close()
    session.trainer.tensorboard.close()
    return [] if rank else read_records(Path(config.directory) / "events.jsonl")


def test_the_rank_that_went_bad_is_named(dataset, tmp_path, rank_pool):
    events, _ = rank_pool(2).run(poison_rank_one, tiny_config(dataset, tmp_path / "run"))
    assert [(e["kind"], e["step"], e["rank"]) for e in events] == [("skip", 3, 1)]
    assert events[0]["parameter"] == "layers.1.mlp.gate_proj.weight"


def test_the_norm_counts_every_element_of_every_piece_once(dataset, tmp_path):
    session = session_for(tiny_config(dataset, tmp_path / "run"))
    result, _ = session.trainer.train_step(0, session.stop)
    squares = [box.tensor.double().square().sum() for box in session.trainer.state.boxes("main_grad")]
    assert result.grad_norm.item() == pytest.approx(sum(squares).sqrt().item(), rel=1e-6)
    session.trainer.loader.close()


def test_too_many_skipped_steps_end_the_run_as_diverged(dataset, tmp_path):
    session = session_for(
        tiny_config(dataset, tmp_path / "run", train={"max_skipped_steps": 3, "log_interval": 1})
    )
    poison(session.trainer, set(range(4, 12)), math.inf)
    with pytest.raises(DivergedError, match="the last 3 steps had non-finite losses or gradients"):
        session.trainer.train(session.stop)
    session.saver.wait()
    session.trainer.loader.close()
    assert session.trainer.completed_steps == 7
    records = read_records(tmp_path / "run/metrics.jsonl")
    assert [r["skipped"] for r in records] == [0, 0, 0, 0, 1, 1, 1]


def test_a_replayed_step_is_the_step(dataset, tmp_path):
    config = tiny_config(dataset, tmp_path / "run", checkpoint={"interval": 4, "keep_last": 0})
    train(config)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for step in (3, 7, 12):
        findings, session = replay(config, CPU, step)
        assert findings.loss == read_losses(tmp_path / "run")[step]
        assert not findings.skipped
        assert findings.replayed_from == (step - 1) // 4 * 4
        session.trainer.tensorboard.close()
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == files


def test_replay_names_the_module_and_parameter_that_went_bad(dataset, tmp_path, monkeypatch):
    config = tiny_config(dataset, tmp_path / "run")
    original = build_session

    def broken(config: RunConfig, mesh: Mesh, *, replay_step: int | None = None) -> Session:
        session = original(config, mesh, replay_step=replay_step)
        session.trainer.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.inf
        return session

    monkeypatch.setattr("megalite.train.replay.build_session", broken)
    findings, _ = replay(config, CPU, 1)
    assert findings.skipped
    assert findings.first_bad_module == "layers.1.mlp.down_proj"
    assert findings.micro_batch == 0
    assert "layers.1.mlp.down_proj.weight" in findings.bad_parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"learning_rate": 1e-4}}, "optimizer.learning_rate: 0.005 then, 0.0001 now"),
        ({"train": {"seed": 7}}, "train.seed: 1 then, 7 now"),
        ({"model": {"num_layers": 3}}, "model.num_layers: 2 then, 3 now"),
    ],
)
def test_other_settings_are_another_run(dataset, tmp_path, changes, message):
    train(tiny_config(dataset, tmp_path / "run"))
    with pytest.raises(UserError, match=message):
        train(tiny_config(dataset, tmp_path / "run", **changes))


def test_a_setting_that_the_stored_run_had_not_is_at_its_default(tmp_path):
    now = to_dict(RunConfig(train=TrainConfig(fp8_scaling="tensorwise")))
    stored = to_dict(RunConfig())
    del stored["train"]["fp8_scaling"]
    check_same_run(stored, to_dict(RunConfig()), tmp_path)
    with pytest.raises(UserError, match=r"train.fp8_scaling: 'rowwise' then, 'tensorwise' now"):
        check_same_run(stored, now, tmp_path)


def test_another_tokenizer_is_refused(dataset, tmp_path):
    other = make_dataset(tmp_path / "other", seed=3, vocab_size=290)
    train(tiny_config(dataset, tmp_path / "run", model={"vocab_size": 300}))
    # the same paths, the folder's contents changed underneath
    moved = tiny_config(dataset, tmp_path / "run", model={"vocab_size": 300})
    manifest_file = max((tmp_path / "run/checkpoints").iterdir()) / "checkpoint.json"
    manifest = json.loads(manifest_file.read_text())
    manifest["tokenizer_fingerprint"] = "0" * 64
    manifest_file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was made with tokenizer 000000000000, the data with"):
        train(moved)
    with pytest.raises(UserError, match=r"model\.vocab_size=100 is smaller than the data's tokenizer"):
        train(tiny_config(other, tmp_path / "run2", model={"vocab_size": 100}))


def test_starting_from_a_hugging_face_folder(dataset, tmp_path):
    train(tiny_config(dataset, tmp_path / "first"))
    weights = max((tmp_path / "first/checkpoints").iterdir()) / "weights"
    session = session_for(tiny_config(dataset, tmp_path / "second", train={"init_from": str(weights)}))
    first = session_for(tiny_config(dataset, tmp_path / "first"))
    a = dict(first.trainer.model.named_parameters())
    for name, parameter in session.trainer.model.named_parameters():
        assert torch.equal(parameter, a[name]), name
    assert session.trainer.completed_steps == 0
    for one in (session, first):
        one.trainer.loader.close()
        one.trainer.tensorboard.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_waits_for_the_host(dataset, tmp_path, precision, monkeypatch):
    """Reading a device value in a step would stop a GPU: every way to do it is forbidden here.

    The model's own pass is replaced, since CPU attention may look at `cu_seqlens` in host memory.
    """
    session = session_for(tiny_config(dataset, tmp_path / "run", train={"precision": precision}))
    trainer = session.trainer
    batches = trainer.load(0)
    trainer.load = lambda step: batches  # type: ignore[method-assign]
    parameters = list(trainer.model.parameters())
    trainer.model.loss = lambda *_, **__: sum(p.float().square().sum() for p in parameters)  # type: ignore[assignment]
    trainer.train_step(0, session.stop)  # once before, so that only the step itself is watched

    def forbidden(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a step read a value back to the host")

    # Native CPU kernels take their scalars from host memory, which is not a wait; the reference runs anywhere.
    with megalite_kernels.use_backend("reference"), monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(torch.Tensor, name, forbidden)
        trainer.train_step(1, session.stop)
    trainer.loader.close()
