"""The kernel benchmarks: every op has one, records are complete, a failing variant loses nothing, the plot is drawn."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.kernels.__main__ as everything
from benchmarks.kernels import common, plot
from benchmarks.kernels.common import Benchmark, main
from benchmarks.kernels.peers import PEERS, Peer
from megalite_kernels.cases import CASES
from megalite_kernels.contract import CONTRACTS

SMALL = ["--device", "cpu", "--seconds", "0.05", "--no-compile", "--dtypes", "fp32"]


@pytest.fixture
def small_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """gelu at a size that takes no time, though large enough for a roof."""
    monkeypatch.setattr(Benchmark, "shapes", lambda self, case, device: [{"T": 1024, "F": 2048}])
    # Of a server it is 0.3 GB, read before every sample: seconds.
    monkeypatch.setattr("megalite_kernels.timing.last_level_cache_bytes", lambda device: 1 << 24)


def test_every_op_has_a_benchmark() -> None:
    modules = [
        importlib.import_module(f"benchmarks.kernels.bench_{name}") for name in everything.benchmarks()
    ]
    assert sorted(module.BENCHMARK.op for module in modules) == sorted(CONTRACTS)
    assert set(PEERS) <= set(CASES)
    for module in modules:
        assert set(module.BENCHMARK.more_shapes) <= {c.name for c in CONTRACTS[module.BENCHMARK.op].cases}


@pytest.mark.usefixtures("small_gelu")
def test_records_say_what_was_measured_on_what_and_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(Benchmark("gelu"), [*SMALL, "--output", str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "gelu.jsonl").read_text().splitlines()]
    assert {(r["variant"], r["pass"]) for r in records} == {
        ("megalite", "forward"), ("megalite", "forward+backward"), ("torch", "forward"),
        ("torch", "forward+backward"), ("copy", "forward"), ("copy", "forward+backward"), ("product", "forward"),
    }  # fmt: skip
    ours = records[0]
    assert ours["bytes"] == 2 * 1024 * 2048 * 4
    assert ours["threads"] == torch.get_num_threads()
    assert all(ours[key] for key in ("device", "versions", "command", "clock", "time", "rounds"))
    table = capsys.readouterr().out
    assert "of copy" in table
    assert "GFLOP" in table
    assert plot.main([str(tmp_path)]) == 0
    assert (tmp_path / "roofline_cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small_gelu")
def test_a_failing_peer_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(x: Any) -> Any:
        raise RuntimeError("no kernel for this card")

    monkeypatch.setattr(Peer, "unusable", lambda self, device: None)
    benchmark = Benchmark("gelu", {"gelu": [Peer("broken", "broken", lambda: fail)]})
    assert main(benchmark, [*SMALL, "--output", str(tmp_path)]) == 0
    assert (
        "one of megalite, torch, broken failed: RuntimeError: no kernel for this card"
        in capsys.readouterr().out
    )
    assert (tmp_path / "gelu.jsonl").exists()


def test_peers_that_are_not_here_are_said() -> None:
    assert Peer("x", "no_such_package", lambda: print).unusable("cuda") == "no_such_package is not installed"
    assert Peer("x", "torch", lambda: print).unusable("cpu") == "torch runs on GPUs only"
    missing = Peer("x", "torch", lambda: common.EAGER.nothing)  # type: ignore[attr-defined]
    assert "does not have it" in (missing.unusable("cuda") or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "rms"], "benchmark 'rms' is not known: use some of adamw, attention"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        everything.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_dtype_and_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(Benchmark("gelu"), ["--dtypes", "bf15"])
    assert "dtype 'bf15' is not known: use some of bf16, fp16, fp32" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path)])
    assert "holds no records" in capsys.readouterr().err


def test_a_roof_is_the_larger_of_two_times() -> None:
    roof = plot.Roof(bytes_per_s=1e9, flops_per_s=1e10)
    record = {"bytes": 2_000_000, "flops": 10_000_000, "median_ms": 4.0}
    assert roof.seconds(record) == pytest.approx(2e-3)
    assert roof.share(record) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no copy of 16 MB or no product in bf16"):
        plot.roof_of([], "bf16")
