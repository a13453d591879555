"""cuda_check in the emulator: what it runs, what it calls broken, and that nothing is not everything."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cuda_check
from megalite_kernels import backend
from megalite_kernels.native.cuda import runtime


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA grad_norm that takes tensors of the CPU, and whose result is twice what it must be in fp16."""
    right = backend._implementations["grad_norm"]["reference"].load()
    assert right is not None

    def wrong(grads: list[torch.Tensor]) -> torch.Tensor:
        return right(grads) * (2 if grads[0].dtype == torch.float16 else 1)

    monkeypatch.setitem(backend._implementations["grad_norm"], "cuda", backend.Implementation(wrong))


@pytest.mark.usefixtures("doubled")
def test_a_wrong_kernel_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda_check.main(["--device", "cpu", "--ops", "grad_norm"]) == 1
    said = capsys.readouterr().out
    assert "BROKEN grad_norm fp16: grad_norm\n       out 0: " in said
    assert "ok     grad_norm fp32: grad_norm\n" in said
    assert "3 checks of 1 ops on CUDA kernels, 1 broken" in said


@pytest.mark.usefixtures("doubled")
def test_a_run_compares_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda_check.main(["--device", "cpu", "--ops", "grad_norm", "--run-only"]) == 0
    assert "0 broken" in capsys.readouterr().out


def test_a_kernel_that_raises_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(grads: list[torch.Tensor]) -> torch.Tensor:
        raise RuntimeError("does not compile")

    monkeypatch.setitem(backend._implementations["grad_norm"], "cuda", backend.Implementation(fail))
    assert cuda_check.main(["--device", "cpu", "--ops", "grad_norm"]) == 1
    assert "RuntimeError: does not compile" in capsys.readouterr().out


def test_that_no_kernel_ran_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(runtime.EMULATE, raising=False)
    assert cuda_check.main(["--device", "cpu", "--ops", "gelu"]) == 1
    assert "no CUDA kernel took part" in capsys.readouterr().out


def test_an_unknown_op(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cuda_check.main(["--ops", "norm"])
    assert stop.value.code == 2
    assert "op 'norm' is not known" in capsys.readouterr().err
