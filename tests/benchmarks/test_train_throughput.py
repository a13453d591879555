"""train_throughput: contenders train the same, who does not is named and not timed, and wrong options are answered."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers.compare import Plan, difference, fits, step_times
from benchmarks.peers.contenders import contenders, select
from benchmarks.peers.gemms import products
from benchmarks.peers.job import Batches, Job, write_data, write_weights
from benchmarks.peers.record import make_record
from benchmarks.peers.table import show
from benchmarks.peers.trainers import Peer, Stepper, open_trainer
from benchmarks.train_throughput import Arguments, Comparison, make_job, make_plan
from megalite.config import ModelConfig
from megalite.errors import UserError
from megalite.models.presets import preset
from megalite_kernels.memory import allocator
from tests.helpers.source import ROOT

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 32,
}
LLAMA = dataclasses.replace(preset("llama-60m"), **SIZES, num_key_value_heads=2)
GPT2 = dataclasses.replace(preset("gpt2-124m"), **SIZES)


def make(folder: Path, model: ModelConfig, precision: str = "fp32") -> Job:
    """A job of tiny size, its files written."""
    job = Job(
        folder=str(folder),
        model=model,
        seq_length=32,
        micro_batch_size=2,
        global_batch_size=4,
        precision=precision,
        device="cpu",
        threads=1,
        clock="process",
        keep_pages=False,
        steps=3,
    )
    write_data(job)
    write_weights(job)
    return job


def train(job: Job, name: str) -> tuple[list[float], int]:
    """(losses, bytes of state) of a contender after the job's steps, in this process."""
    with open_trainer(job, contenders(job.model, job.precision)[name]) as trainer:
        _, losses = Stepper(trainer, job).run(job.steps)
        return losses, trainer.state_bytes()


def refused(losses: list[float], reference: list[float], job: Job) -> str:
    """What the comparison says of losses beside ours."""

    def entry(name: str, values: list[float]) -> Any:
        return type(
            "Entry", (), {"losses": values, "contender": contenders(job.model, job.precision)[name]}
        )()

    return difference(entry("hf-llama", losses), [entry("megalite", reference)], job)


PACKAGES = {"litgpt": "litgpt", "torchtitan": "torchtitan", "megatron-core": "megatron"}
"""Contender → the package that it needs."""
INSTALLED = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Our trainer sets threads, allocator and determinism of its process: here it must leave the tests' alone."""
    monkeypatch.setattr("benchmarks.peers.trainers.prepare_process", lambda config, mesh: None)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (LLAMA, ["hf-llama", "plain-llama"]),
        (GPT2, ["hf-gpt2", "nanogpt-style"]),
    ],
    ids=["llama", "gpt2"],
)
def test_every_peer_trains_as_we_do(tmp_path: Path, model: ModelConfig, names: list[str]) -> None:
    """In fp32, gradient accumulation and grouped queries included."""
    job = make(tmp_path, model)
    ours, held = train(job, "megalite")
    for name in names:
        losses, state = train(job, name)
        assert losses == pytest.approx(ours, rel=2e-6), name
        # weights, gradients, two moments; the buffers of ours are padded
        assert state <= held <= 1.5 * state, name


@pytest.mark.parametrize("name", ["plain-llama-autocast", "plain-llama-bf16w", "hf-llama-bf16w"])
def test_bf16_forms_train_as_we_do(tmp_path: Path, name: str) -> None:
    job = make(tmp_path, LLAMA, "bf16")
    ours, _ = train(job, "megalite")
    assert train(job, name)[0] == pytest.approx(ours, rel=1e-3)


def test_who_trains_differently_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another learning rate, and labels one place off."""
    job = make(tmp_path, LLAMA)
    job = dataclasses.replace(job, optimizer=dataclasses.replace(job.optimizer, learning_rate=3e-3))
    ours, _ = train(job, "megalite")
    assert not refused(train(job, "plain-llama")[0], ours, job)
    faster = dataclasses.replace(job, optimizer=dataclasses.replace(job.optimizer, learning_rate=4e-3))
    assert "does not train the same" in refused(train(faster, "plain-llama")[0], ours, job)
    step = Batches.step
    monkeypatch.setattr(Batches, "step", lambda self, n: [(x, y.roll(1, dims=1)) for x, y in step(self, n)])
    assert "does not train the same" in refused(train(job, "plain-llama")[0], ours, job)
    assert "does not train the same" in refused([math.nan, *ours[1:]], ours, job)


def test_masters_are_what_the_optimizer_updates(tmp_path: Path) -> None:
    """Changes too small for bf16 add up in the masters of a peer with bf16 weights."""
    job = make(tmp_path, LLAMA, "bf16")
    contender = contenders(job.model, job.precision)["plain-llama-bf16w"]
    with open_trainer(job, contender) as trainer:
        assert isinstance(trainer, Peer)
        trainer.step()
        assert {p.dtype for p in trainer.parameters} == {torch.bfloat16}
        assert {p.dtype for p in trainer.masters} == {torch.float32}
        assert any(
            not torch.equal(m, p.float()) for m, p in zip(trainer.masters, trainer.parameters, strict=True)
        )
        assert all(
            torch.equal(m.bfloat16(), p) for m, p in zip(trainer.masters, trainer.parameters, strict=True)
        )


def test_documents_inside_samples_are_refused_by_peers(tmp_path: Path) -> None:
    job = dataclasses.replace(make(tmp_path / "a", LLAMA), folder=str(tmp_path / "b"))
    write_data(job, document_tokens=8)
    with pytest.raises(ValueError, match="documents end inside samples"):
        Batches(job).step(0)


def test_unknown_contenders_are_refused_with_the_list(tmp_path: Path) -> None:
    job = make_job(Arguments(device="cpu"), tmp_path)
    with pytest.raises(
        UserError, match=r"unknown contender 'plain-lama'.*Known: all, megalite, .*torchtitan-bf16w"
    ):
        select(["plain-lama"], job)
    chosen, skipped = select(["all"], job)
    assert chosen[0].name == "megalite"
    reasons = {entry["name"]: entry["reason"] for entry in skipped}
    assert reasons["hf-llama-liger-bf16w"] == "runs on cuda only"
    for name in PACKAGES.keys() - set(INSTALLED):
        assert "pip install --no-deps" in reasons[f"{name}-bf16w"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "--precision 'fp16': use one of auto, bf16, fp32, fp8"),
        ({"precision": "fp8"}, "needs a GPU"),
        ({"clock": "process", "threads": 2}, "with --threads 1"),
        ({"seq_length": 4096}, "must be in 1 ... 512"),
        ({"micro_batch_size": 4, "global_batch_size": 6}, "must be a multiple of 4"),
        ({"preset": "llama-60"}, "did you mean llama-60m"),
        ({"rounds": -1}, "must be at least 1"),
    ],
)
def test_wrong_options_are_answered(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_job(Comparison(device="cpu", **options), tmp_path)
    assert message in str(error.value)


def test_turns_need_room_for_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-60m's state is 0.8 GB: ten fit in 24 GB, forty do not."""
    monkeypatch.setattr("benchmarks.peers.memory.available_bytes", lambda: 24 << 30)
    job = make_job(Arguments(device="cpu"), tmp_path)
    assert fits(job, 10)
    assert not fits(job, 40)


def test_products_are_those_of_the_model() -> None:
    """Forward, inputs and weights of every linear layer, with the FLOPs of the layer each."""
    found = products(preset("llama-60m"), 2048)
    assert found["2048x32000x512"] == (2048, 32000, 512, "forward")
    assert found["2048x512x32000"] == (2048, 512, 32000, "dgrad")
    assert found["32000x512x2048"] == (32000, 512, 2048, "wgrad")
    assert {"2048x2048x2048", "4096x4096x4096"} <= found.keys()


def test_record_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rates follow from the median step; the table names the fastest first."""
    job = make(tmp_path, LLAMA)
    rows = [
        {
            "name": name, "kind": kind, **step_times(times), "peak_memory_bytes": 3, "memory_above_state_bytes": 1,
            "losses": [5.0],
        }
        for name, kind, times in (("a-peer", "peer", [40.0, 20.0, 30.0]), ("megalite", "ours", [10.0]))
    ]  # fmt: skip
    plan = Plan(compared=1, warmup=0, rounds=1, steps_per_round=1)
    record = make_record(
        "tiny", job, plan, rows, [{"name": "x", "reason": "not here"}], {"a": 0.5, "b": 0.25}
    )
    assert json.loads(json.dumps(record)) == record
    peer = record["contenders"][0]
    assert peer["step_ms_p50"] == 30.0
    assert peer["tokens_per_s"] == pytest.approx(128 / 0.030)
    assert peer["gemm_fraction"] == pytest.approx(128 / 0.030 * record["flops_per_token_causal"] / 0.5e12)
    show(record)
    said = capsys.readouterr().err
    assert said.index("megalite") < said.index("a-peer")
    assert "3.00" in said
    assert "skipped x: not here" in said


def test_plan_counts_every_step() -> None:
    assert make_plan(Comparison(device="cpu", rounds=3, steps=7, compared=2, warmup=1)).total == 2 + 1 + 3 * (
        3 + 1
    )


def run(*options: str) -> tuple[dict[str, Any], str]:
    """The record of the command, and its standard error."""
    command = [
        sys.executable,
        "benchmarks/train_throughput.py",
        "--json",
        "--precision",
        "fp32",
        "--seq-length",
        "32",
    ]
    command += ["--micro-batch-size", "2", "--threads", "1", "--clock", "process", "--rounds", "2", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_whole_run(tmp_path: Path) -> None:
    """Processes, turns, memory, the compiled contender and the records file."""
    output = tmp_path / "records.jsonl"
    names = ["megalite", "megalite-default-malloc", "hf-qwen3-compile", "plain-llama"]
    model = ["--preset", "tiny", "--vocab-size", "320"]
    record, said = run(*model, "--steps", "4", "--output", str(output), "--contenders", *names)
    assert json.loads(output.read_text()) == record
    rows = {row["name"]: row for row in record["contenders"]}
    assert rows.keys() == {"megalite", "megalite-default-malloc", "hf-qwen3-compile"}, said
    assert [entry["name"] for entry in record["skipped"]] == ["plain-llama"]
    assert "qk_norm" in record["skipped"][0]["reason"]
    for row in rows.values():
        assert row["measured_steps"] == 4
        assert row["losses"] == pytest.approx(rows["megalite"]["losses"], rel=1e-4)
        assert row["state_bytes"] > 0
    assert rows["megalite"]["allocator"] == allocator()
    assert rows["megalite-default-malloc"]["allocator"] == "glibc"
    assert record["gemm_peak_tflops"] == max(record["gemm_shapes"].values()) > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(
    not INSTALLED, reason="needs litgpt, torchtitan or megatron-core: pip install --no-deps ..."
)
def test_other_libraries_train_as_we_do() -> None:
    """Each that is installed, at a real shape, in a process of its own."""
    record, said = run("--preset", "llama-60m", "--steps", "2", "--contenders", "megalite", *INSTALLED)
    assert [row["name"] for row in record["contenders"]] == ["megalite", *INSTALLED], said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_measure_our_layout() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "benchmarks/train_throughput.py", "--preset", "tiny", "--parallel.tp", "2", "--json"]
    command += ["--seq-length", "32", "--threads", "1", "--steps", "2", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["layout"], record["processes"]) == ("tp2", 2)
    assert [row["name"] for row in record["contenders"]] == ["megalite"]
    assert record["skipped"][0]["name"] == "peers"
