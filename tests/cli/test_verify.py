"""``megalite verify``: what it prints, its JSON, its exit codes, and that it finds a mistake planted in the ranks."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megalite.cli.config_file import parse_run
from megalite.cli.main import main
from megalite.cli.verify import VerifyArguments, _dtype
from megalite.errors import ExitCode
from tests.helpers.runs import ROOT, command, environment, run, write_config

pytestmark = pytest.mark.timeout(240)  # seconds where the machine is shared; about 10 where it is not
SMALL = ["--preset", "llama3-8b", "--train.device", "cpu"]
PLANT = """
import sys
# Only the processes of the pool are forked from a server; the others stay as they are.
if any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    import megalite.parallel.data as data
    data.sum_partial = lambda boxes, tp: None
"""


def planted(tmp_path: Path, plant: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``megalite verify ARGUMENTS`` with a module that changes functions in the processes of the ranks."""
    (tmp_path / "sitecustomize.py").write_text(plant)
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
    return subprocess.run(
        command("verify", *SMALL, *arguments),
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=ROOT,
    )


def test_json_of_a_sound_program() -> None:
    done = run("verify", *SMALL, "--dtype", "fp32", "--layouts", "tp2-sp,dp2-zero1", "--json", timeout=200)
    assert done.returncode == ExitCode.DONE, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["equal"] is True
    assert found["counts"] == {"equal": 3, "wrong": 0, "failed": 0, "skipped": 0}
    assert found["shrunk"]["family"] == "llama"
    assert found["limits"]["float64"] == {"of_largest": 1e-10}
    assert found["limits"]["fp32"] == {"of_largest": 1e-5, "times_one_process": 2.0}
    names = [layout["name"] for layout in found["layouts"]]
    assert names == ["one process", "tp2-sp", "dp2-zero1"]
    for layout in found["layouts"]:
        assert layout["status"] == "equal"
        assert layout["first_wrong"] is None
        assert layout["errors"] == []
        for dtype, limit in (("float64", 1e-10), ("fp32", 1e-5)):
            check = layout["checks"][dtype]
            assert check["wrong"] == 0
            assert check["loss"] > 1
            assert check["grad_norm"] > 0
            worst = check["worst"]["gradient"]
            assert worst["name"].endswith((".weight", ".bias"))
            assert worst["of_largest"] <= limit
    assert found["layouts"][1]["parallel"]["tp"] == 2


def test_a_planted_mistake_is_found_and_named(tmp_path: Path) -> None:
    done = planted(tmp_path, PLANT, "--layouts", "tp2,tp2-sp", "--dtype", "float64", "--json")
    assert done.returncode == ExitCode.BROKEN_CONTRACT, done.stderr
    found = {layout["name"]: layout for layout in json.loads(done.stdout)["layouts"]}
    assert found["one process"]["status"] == found["tp2"]["status"] == "equal"
    assert found["tp2-sp"]["status"] == "wrong"
    first = found["tp2-sp"]["first_wrong"]
    assert (first["kind"], first["name"]) == ("gradient", "final_norm.weight")
    assert first["hint"] == "a missing sum over tp: the ranks' values add up to what is expected"
    assert "layers.*.mlp_norm.weight" in first["also_wrong"]
    assert first["right"] > 10


def test_layouts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--list"]) == ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["own", "4", "processes", "own:", "dp4-zero1"]
    assert any(line.split() == ["pp", "4", "processes", "pp4-zbv"] for line in lines)
    assert sum("dp4-zero1" in line.split() for line in lines) == 1  # not a second time under its own name
    assert main(["verify", "--list", "--full"]) == ExitCode.DONE
    assert len(capsys.readouterr().out.splitlines()) > len(lines)


def test_a_run_for_gpus_can_be_checked_without(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--train.device", "cuda", "--list"]) == ExitCode.DONE
    assert "tp2-sp" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        (["--train.device", "cuda"], "bf16"),
        (["--train.precision", "fp32"], "fp32"),
        (["--train.precision", "fp32", "--dtype", "float64"], "float64"),
    ],
)
def test_the_type_of_the_run(arguments: list[str], dtype: str) -> None:
    parsed, config = parse_run(VerifyArguments, arguments, prog="megalite verify")
    assert _dtype(parsed, config, "cpu") == dtype


def test_the_configuration_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(
        tmp_path / "run.toml",
        {"preset": "gpt2-124m", "parallel": {"tp": 2, "pp": 4, "pp_schedule": "zbv", "zero": 3}},
    )
    assert main(["verify", str(config), "--list"]) == ExitCode.DONE
    out = capsys.readouterr().out
    assert "own: tp2-sp-pp4-zbv" in out  # needs 8 processes, so it may have them
    assert main(["verify", str(config), "--processes", "4", "--list"]) == ExitCode.DONE
    assert "own: tp2-sp-pp2-zbv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "1"], "--processes 1 leaves no layout to compare"),
        (["--processes", "-2"], "--processes -2 must not be negative"),
        (["--timeout", "0"], "--timeout 0.0 must be greater than 0 seconds"),
        (["--layouts", "tp3"], "--layouts 'tp3' matches none of the"),
        (["--preset", "llama9"], "unknown model preset 'llama9'"),
        (["missing.toml"], "configuration missing.toml does not exist"),
        (
            ["--preset", "qwen2.5-0.5b", "--parallel.tp", "4"],
            "parallel.tp=4 must divide model.num_attention_heads=14",
        ),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *arguments]) == ExitCode.BAD_INPUT
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert error.count("\n") == 1
