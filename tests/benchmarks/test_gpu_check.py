"""gpu_check: without a GPU, with failing and hanging steps, with wrong arguments."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Step
from tests.helpers.source import ROOT


@pytest.fixture
def three_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails, one that hangs with a child of its own, one that passes."""

    def steps(part: str, device: str, out: Path) -> Iterator[Step]:
        yield Step(part, "fails", [sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"], 60)
        hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
        yield Step(part, "hangs", [sys.executable, "-c", hang], 1)
        yield Step(part, "passes", [sys.executable, "-c", "print('3 passed')"], 60)

    monkeypatch.setattr(gpu_check, "steps", steps)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "benchmarks/gpu_check.py", "--out", "unused"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu-check: error: torch")
    assert "finds no GPU on this machine: nothing was checked" in done.stderr
    assert not (ROOT / "unused").exists()


@pytest.mark.usefixtures("three_steps")
def test_later_steps_run_after_failures_and_the_exit_code_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    assert gpu_check.main(["--out", str(tmp_path), "--parts", "tests", "--device", "cpu"]) == 1
    assert time.monotonic() - start < 30
    records = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert [(r["step"], r["ok"]) for r in records] == [("fails", False), ("hangs", False), ("passes", True)]
    assert records[0]["summary"] == "exit code 3: what went wrong"
    assert records[1]["summary"] == "stopped after 1 s"
    assert records[2]["summary"] == "3 passed"
    assert all(r["card"] and r["versions"]["torch"] == torch.__version__ for r in records)
    assert "2 failed" in capsys.readouterr().out


@pytest.mark.usefixtures("three_steps")
def test_a_parts_time_is_shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "PART_LIMIT_S", 0.0)
    results = list(gpu_check.run_part("tests", "cpu", tmp_path))
    assert [result.summary for result in results] == ["not started: the part's time is used up"] * 3


def test_the_catalogue_and_the_doctor_are_told_the_device(tmp_path: Path) -> None:
    tests = list(gpu_check.steps("tests", "cuda", tmp_path))
    assert "test_isa" not in {step.name for step in tests}
    assert {step.name for step in tests} >= {"test_norms", "test_attention", "test_support"}
    assert all(step.environment == {"MEGALITE_TEST_DEVICE": "cuda"} for step in tests)
    for part in (*gpu_check.PARTS, *gpu_check.NAMED):
        every = list(gpu_check.steps(part, "cuda", tmp_path))
        assert every
        assert all(step.limit_s < 600 for step in every)
    doctor = next(gpu_check.steps("doctor", "cuda", tmp_path)).command
    assert doctor[doctor.index("--device") + 1] == "cuda"


def test_cuda_kernels_are_proven_before_they_are_timed(tmp_path: Path) -> None:
    order = list(gpu_check.PARTS)
    assert order.index("cuda") < order.index("sanitizer") < order.index("bench")
    loader, contracts, *catalogue = gpu_check.steps("cuda", "cuda", tmp_path)
    assert contracts.command[1:] == ["-m", "benchmarks.cuda_check", "--device", "cuda"]
    assert (ROOT / loader.command[-1]).is_file()
    for step in catalogue:
        assert step.environment == {"MEGALITE_TEST_DEVICE": "cuda", "MEGALITE_TEST_KERNELS": "cuda"}
        assert (ROOT / step.command[-1]).is_file()


def test_the_sanitizer_runs_every_tool_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/tools/{name}" if "/" not in name else None)
    steps = list(gpu_check.steps("sanitizer", "cuda", tmp_path))
    assert [step.name for step in steps] == ["memcheck", "racecheck", "initcheck"]
    assert all(step.command[0] == "/tools/compute-sanitizer" for step in steps)
    assert all("--run-only" in step.command for step in steps)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    (result,) = gpu_check.run_part("sanitizer", "cuda", tmp_path)
    assert result.ok
    assert result.summary == "skipped: compute-sanitizer is not installed"


def test_the_catalogue_refuses_a_device_that_is_not_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_linear.py"]
    step = Step("tests", "linear", command, 60, {"MEGALITE_TEST_DEVICE": "cuda"})
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", **step.environment, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode != 0
    assert "MEGALITE_TEST_DEVICE=cuda, but torch finds no GPU on this machine" in done.stdout + done.stderr


def test_a_missing_compiler_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    (result,) = gpu_check.run_part("build", "cpu", tmp_path)
    assert result.ok
    assert result.summary.startswith("skipped: no C++ compiler")


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--out", "x", "--parts", "test"])
    assert stop.value.code == 2
    assert (
        "part 'test' is not known: use some of build, doctor, tests, cuda, sanitizer, bench"
        in capsys.readouterr().err
    )
