"""``megalite plan``: what it says about a configuration, and about one that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.cli.main import main
from megalite.errors import ExitCode

CONFIG = """
preset = "llama3-8b"
[train]
seq_length = 4096
micro_batch_size = 1
global_batch_size = 64
[parallel]
tp = 2
pp = 4
pp_schedule = "interleaved"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG)
    return path


def plan(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    assert main(["plan", *map(str, words), "--json"]) == ExitCode.DONE
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_numbers_of_a_layout(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = plan(capsys, config, "--processes", 16)
    assert answer["mesh"] == {"tp": 2, "cp": 1, "dp": 2, "pp": 4}
    assert answer["micro_batches"] == 32
    layers = [layer for rank in answer["ranks"] for stage in rank["layers"] for layer in stage]
    assert sorted(layers) == list(range(32))
    assert [rank["stages"] for rank in answer["ranks"]] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert sum(rank["flops_share"] for rank in answer["ranks"]) == pytest.approx(1)
    assert len(answer["ranks"][3]["layers"][1]) == 2  # the head weighs 2.2 layers
    assert answer["bubble"] == pytest.approx(sum(rank["bubble"] for rank in answer["ranks"]) / 4)
    found = {other["schedule"]: other for other in answer["schedules"]}
    assert found["interleaved"]["bubble"] == answer["bubble"]
    assert found["zbv"]["stages_per_rank"] == 2
    assert found["gpipe"]["peak_layers"] > found["1f1b"]["peak_layers"]
    for rank in answer["ranks"]:
        assert rank["sent_bytes"]["cp"] == 0
        assert all(rank["sent_bytes"][axis] > 0 for axis in ("tp", "pp", "dp"))
        memory = rank["memory_bytes"]
        assert memory["total"] == sum(value for name, value in memory.items() if name != "total")


def test_overrides_and_layers_made_again(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Running layers twice costs traffic and saves memory."""
    keeping = plan(capsys, config, "--processes", 8)["ranks"][0]
    again = plan(capsys, config, "--processes", 8, "--recompute.kind", "full")["ranks"][0]
    assert again["memory_bytes"]["activations"] < 0.3 * keeping["memory_bytes"]["activations"]
    layers = sum(map(len, keeping["layers"]))
    assert again["sent_bytes"]["tp"] / keeping["sent_bytes"]["tp"] == pytest.approx(
        (13 * layers + 2) / (10 * layers + 2), rel=1e-3
    )


def test_without_a_pipeline(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = plan(capsys, config, "--processes", 2, "--parallel.pp", 1)
    assert answer["schedule"] is None
    assert answer["bubble"] is None
    assert answer["schedules"] == []
    assert answer["ranks"][0]["flops_share"] == 1.0


def test_what_people_read(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    words = [str(config), "--processes", "8", "--train.global-batch-size", "4"]
    assert main(["plan", *words]) == ExitCode.DONE
    text = capsys.readouterr().out
    assert "llama3-8b: 32 layers, 8.03 billion parameters" in text
    assert "8 processes = tp 2 · cp 1 · dp 1 · pp 4" in text
    assert "4 micro-batches of 1 on each data-parallel rank" in text
    assert "no deadlock" in text
    assert "needs at least 8 micro-batches a step, not 4" in text  # dualpipev
    for title in (
        "Pipeline ranks",
        "Schedules, simulated",
        "GB that each rank sends",
        "GB that each rank needs",
    ):
        assert title in text
    assert max(map(len, text.splitlines())) <= 130


def test_a_drawing(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "schedule.svg"
    plan(capsys, config, "--processes", 8, "--train.global-batch-size", 4, "--draw", picture)
    text = picture.read_text()
    assert "interleaved: 4 ranks × 2 stages, 4 micro-batches" in text
    assert "time, in forward passes of one layer" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "12"], "needs a multiple of 8 processes, not 12: start 8 or 16"),
        (["--processes", "0"], "--processes 0 must be at least 1"),
        (["--processes", "6", "--parallel.tp", "3", "--parallel.pp", "1"], "parallel.tp=3 must divide"),
        (
            ["--processes", "8", "--train.global-batch-size", "9"],
            "whole rounds of pp=4, not 9 a step: take 8 or 12",
        ),
        (
            ["--processes", "64", "--train.global-batch-size", "12"],
            "12 samples a step cannot be divided over dp=8",
        ),
        (["--processes", "8", "--train.seq-length", "4095"], "4095 tokens must be a multiple of 2"),
        (
            ["--processes", "2", "--parallel.pp", "1", "--draw", "a.png"],
            "parallel.pp=1 has no schedule to draw",
        ),
        (["--processes", "8", "--draw", "a.gif"], "a drawing ends in .png, .svg, .pdf"),
        (["--processes", "8", "--model.vocab-size", "0"], "give --model.vocab-size"),
    ],
)
def test_what_does_not_fit_is_one_line(
    config: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["plan", str(config), *words]) == ExitCode.BAD_INPUT
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
