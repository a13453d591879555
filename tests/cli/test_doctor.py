"""``megalite doctor`` and ``python -m megalite_kernels.doctor``: what they say, and with which exit code."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.cli.main import main
from megalite.errors import ExitCode
from megalite_kernels import backend, doctor, environment
from megalite_kernels.doctor_tables import as_text
from tests.helpers.runs import run

QUICK = ["--quick", "--device", "cpu"]


@pytest.fixture
def broken_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gelu whose backward is off by one part in a hundred, first on the CPU."""
    right = backend._implementations["activation_bwd"]["reference"].load()
    assert right is not None

    def wrong(dy: Tensor, x: Tensor, kind: str) -> Tensor:
        return 1.01 * right(dy, x, kind)

    monkeypatch.setitem(backend._implementations["activation_bwd"], "cpu", backend.Implementation(wrong))


def test_a_sound_installation() -> None:
    report = doctor.examine(["gelu", "grad_norm"], device="cpu", quick=True)
    assert not report.broken
    assert {check.case for check in report.checks} == {"gelu", "grad_norm"}
    assert len(report.checks) == 6  # two cases in three dtypes
    assert all(check.backends for check in report.checks)
    text = as_text(report)
    assert "All contracts are kept: 2 cases" in text
    assert "gelu" in text
    if not torch.cuda.is_available():
        assert "GPU: none found; GPU kernels were not measured on this machine" in text


@pytest.mark.usefixtures("broken_gelu")
def test_a_broken_contract_is_named_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *QUICK, "--ops", "gelu,swiglu"]) == ExitCode.BROKEN_CONTRACT == 4
    text = " ".join(capsys.readouterr().out.split())
    assert "Contracts are broken by: gelu." in text
    assert "BROKEN gelu (gelu, fp32, cpu): grad 0: error" in text
    assert doctor.main([*QUICK, "--ops", "gelu", "--json"]) == doctor.BROKEN_EXIT_CODE == 4
    found = json.loads(capsys.readouterr().out)
    assert found["broken"] == ["gelu"]
    assert not found["sound"]
    fp32 = next(check for check in found["checks"] if check["dtype"] == "fp32")
    assert fp32["results"]["out 0"]["kept"]
    assert not fp32["results"]["grad 0"]["kept"]
    assert fp32["results"]["grad 0"]["error"] > fp32["results"]["grad 0"]["limit"]


def test_an_op_that_raises_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(grads: list[Tensor]) -> Tensor:
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setitem(backend._implementations["grad_norm"], "cpu", backend.Implementation(refuse))
    report = doctor.examine(["grad_norm"], device="cpu", quick=True)
    assert report.broken[0].problem == "RuntimeError: no kernel image"
    assert "BROKEN grad_norm (grad_norm, bf16, cpu): RuntimeError: no kernel image" in as_text(report)


def test_speeds_are_held_to_a_copy_and_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a server it is 0.3 GB, read before every sample: seconds.
    monkeypatch.setattr("megalite_kernels.timing.last_level_cache_bytes", lambda device: 1 << 24)
    report = doctor.examine(["relu_squared", "grad_norm"], device="cpu", budget_s=0.0)
    variants = {(s.case, s.passes, s.variant) for s in report.speeds["cpu"]}
    assert ("relu_squared", "forward+backward", "megalite") in variants
    assert ("grad_norm", "forward", "torch") in variants
    assert ("grad_norm", "forward+backward", "torch") not in variants
    ours = next(s for s in report.speeds["cpu"] if s.case == "relu_squared" and s.variant == "megalite")
    assert ours.bytes == 2 * 2048 * 1408 * ours.dtype.itemsize
    assert 0.05 < ours.of_copy < 2
    text = as_text(report)
    assert "vs torch" in text
    assert "best copy" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "rms"], "op 'rms' is not known: use some of rms_norm"),
        pytest.param(
            ["--device", "cuda"],
            "device 'cuda' is not here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == ExitCode.BAD_INPUT
    assert message in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit) as stop:
        doctor.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_json_is_the_only_thing_on_standard_output() -> None:
    done = run("doctor", *QUICK, "--ops", "gelu", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["sound"]
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert set(found["backends"]) == {"cpu"}
    assert found["backends"]["cpu"]["activation_fwd"]["backend"] in ("cpu", "reference")


def test_facts_of_a_machine_without_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment.facts()
    found["native"] = {"built": False, "reason": "No module named 'megalite_kernels._C'"}
    lines = dict(environment.describe(found))
    assert lines["native library"] == "not built (No module named 'megalite_kernels._C')"
    assert environment.version("no_such_package_at_all") is None
    assert environment.version("torch") in (torch.__version__, torch.__version__.split("+")[0])


def test_another_package_named_apex_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"apex": "0.9", "torch": "2"}
    monkeypatch.setattr(environment, "version", versions.get)
    assert environment.peer_version("apex") == "0.9 (without NVIDIA's fused_layer_norm_cuda: not used)"
    versions["fused_layer_norm_cuda"] = "1"
    assert environment.peer_version("apex") == "0.9"
    assert environment.peer_version("quack") is None
