"""``megalite bench``: what it prints, draws and leaves for the report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megalite.cli.bench_table import print_bench
from megalite.cli.main import main
from megalite.errors import ExitCode
from megalite.train import setup, waterfall_run
from megalite.train.flops import Precision, flops_per_token
from megalite.train.report import write_report
from megalite.train.waterfall import LABELS, Machine, StepTimes, build_waterfall
from megalite.train.waterfall_run import Bench
from tests.helpers.fake_run import write_fake_run
from tests.helpers.runs import run, write_config
from tests.helpers.tiny import tiny_values
from tests.parallel.layouts import MODELS


@pytest.fixture
def config(tmp_path: Path) -> Path:
    values = tiny_values(tmp_path / "none", tmp_path / "run")
    del values["data"]
    values["model"]["vocab_size"] = 320
    return write_config(tmp_path / "run.toml", values)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine is measured, and the process keeps its settings."""
    machine = Machine(peak_tflops=0.1, peak_source="made up", copy_bytes_per_s=10e9)
    monkeypatch.setattr(waterfall_run, "_measure_machine", lambda session: machine)
    monkeypatch.setattr(waterfall_run, "best_product_tflops", lambda times: 0.0)
    monkeypatch.setattr(setup, "prepare_process", lambda config, mesh: None)
    chosen = Precision("fp32", "fp32", "as configured", 0.1, 0.1)
    monkeypatch.setattr(setup, "choose_precision", lambda requested, device: chosen)


def bench(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[dict[str, Any], str]:
    """The JSON line and the table."""
    assert main(["bench", *map(str, words), "--json"]) == ExitCode.DONE
    printed = capsys.readouterr()
    return json.loads(printed.out.splitlines()[-1]), printed.err


def test_speed_alone(quick, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, table = bench(capsys, config, "--rounds", 3, "--bench-warmup", 1)
    assert record["measured_steps"] == 3
    assert record["step_ms_p10"] <= record["step_ms_p50"] <= record["step_ms_p90"]
    assert record["tokens_per_s"] == pytest.approx(8 * 32 / record["step_ms_p50"] * 1e3)
    assert 0 < record["mfu_causal"] < record["mfu_full"]
    assert len(record["losses"]) == 4
    assert "parts" not in record
    assert f"{record['tokens_per_s']:,.0f} tokens/s" in table


def test_waterfall_in_every_form(
    quick, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    folder, drawing = write_fake_run(tmp_path / "old", steps=30), tmp_path / "waterfall.svg"
    words = ("--rounds", 1, "--bench-warmup", 1, "--draw", drawing, "--record", folder)
    record, table = bench(capsys, config, *words)
    assert [part["key"] for part in record["parts"]] == list(LABELS)
    assert sum(part["share"] for part in record["parts"]) + record["mfu_causal"] == pytest.approx(1)
    assert sum(part["mfu_points"] for part in record["parts"]) == pytest.approx(
        100 - 100 * record["mfu_causal"]
    )
    assert record["flops_counted"] == record["flops_model"]
    shown = [part["label"] for part in record["parts"] if abs(part["share"]) > 0.001]
    assert len(shown) > 4
    report = write_report(folder).read_text(encoding="utf-8")
    picture = drawing.read_text(encoding="utf-8")
    for label in shown:
        assert label in table
        assert label[:1].upper() + label[1:] in report
        assert label[:1].upper() + label[1:] in picture
    assert "megalite bench" in report
    del record["benchmark"]
    kept = json.loads((folder / "waterfall.json").read_text(encoding="utf-8"))
    assert kept["parts"] == record["parts"]


def test_a_waterfall_that_does_not_add_up_is_told_how_steady_the_steps_were(capsys) -> None:
    bench = Bench(
        tokens_per_step=1000, tokens_per_s=1e4, mfu_causal=0.5, mfu_full=0.6, step_ms=(90.0, 100.0, 130.0),
        measured_steps=4, losses=(), machine=Machine(peak_tflops=0.1, peak_source="made up", copy_bytes_per_s=1e9),
        clock="wall",
    )  # fmt: skip
    times = StepTimes(
        90.0, 0.0, dict.fromkeys((key for key in LABELS if key != "unexplained"), 0.0) | {"gemm": 90.0}
    )
    facts = {
        "layout": {}, "machine": {}, "precision": {"chosen": "fp32"}, "name": "made up", "seq_length": 8
    }  # fmt: skip
    for step, told in ((91.0, False), (100.0, True)):
        waterfall = build_waterfall(
            times, step, flops=flops_per_token(MODELS["llama"], 32), tokens=1, machine=bench.machine
        )
        print_bench(Console(width=200), dataclasses.replace(bench, waterfall=waterfall), facts)
        printed = capsys.readouterr().out
        assert ("plain steps vary by 40% here (p10 to p90)" in printed) == told
        assert ("of the step is unexplained" in printed) == told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds 0 and --bench-warmup 2 must be at least 1"),
        (["--draw", "a.jpg"], "--draw a.jpg: a drawing ends in .png, .svg or .pdf"),
        (["--record", "nowhere"], "--record nowhere: there is no such run folder"),
        (["--explain", "--train.compile"], "train.compile=true: the waterfall stamps ops one by one"),
        (["--clock", "process", "--parallel.tp", "2"], "parallel.tp=2"),
    ],
)
def test_wrong_arguments(
    words: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(config), *words]) == ExitCode.BAD_INPUT
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tp", "pp", "dp"])
def test_on_two_ranks(axis: str, config: Path) -> None:
    layout = [] if axis == "dp" else [f"--parallel.{axis}", "2"]
    done = run("bench", str(config), "--rounds", "3", "--check", "--json", *layout, processes=2)
    # A busy machine disagrees with itself: torchrun then says that a process ended with 4.
    assert done.returncode == ExitCode.DONE or "exitcode  : 4 " in done.stderr, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, "rank 0 prints"
    record = json.loads(lines[0])
    times = {part["key"]: part["time_ms"] for part in record["parts"]}
    assert sum(part["share"] for part in record["parts"]) + record["mfu_causal"] == pytest.approx(1)
    assert not record["unknown_ops"]
    assert times["bubble" if axis == "pp" else f"communication_{axis}"] > 0
    if axis != "pp":  # two stages: the embedding's gradient travels, all else is the formula's
        assert record["flops_counted"] == pytest.approx(record["flops_model"], rel=1e-6)
