"""What the doctor says of the CUDA kernels, with the reason for it, on machines that this one is made to look like."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megalite_kernels import environment
from megalite_kernels.native.cuda import binaries, libcuda, nvrtc, runtime, sources, state
from megalite_kernels.native.cuda.kernel import instance

FIRST = instance("scale.cuh", "scale", threads=32, FACTOR=1)
SECOND = instance("scale.cuh", "scale", threads=64, FACTOR=1)


class Machine:
    """Replaces what `state` asks."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def driver(self, present: bool) -> None:
        def fail() -> None:
            raise libcuda.DriverError("NVIDIA's driver is not installed (libcuda.so.1: no such file)")

        found = SimpleNamespace(version=lambda: (13, 0))
        self.patch.setattr(libcuda, "driver", (lambda: found) if present else fail)

    def gpus(self, *capabilities: tuple[int, int]) -> None:
        self.patch.setattr(torch.version, "cuda", "13.0")
        self.patch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        self.patch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])

    def nvrtc(self, present: bool) -> None:
        found = SimpleNamespace(version=(13, 0), path="/lib/libnvrtc.so.13")
        self.patch.setattr(nvrtc, "find", lambda _=None: found if present else None)

    def archive(self, cubins: dict[str, list[str]], ptx: str | None = None) -> None:
        found = binaries.Archive.__new__(binaries.Archive)
        found.nvcc = "13.0.88"
        found.entries = {key: {"key": key, "cubins": some, "ptx": ptx} for key, some in cubins.items()}
        self.patch.setattr(binaries, "archive", lambda: found)


@pytest.fixture
def machine(folder, monkeypatch):
    monkeypatch.delenv(runtime.EMULATE, raising=False)
    monkeypatch.setattr(sources, "shipped", lambda: [FIRST, SECOND])
    made = Machine(monkeypatch)
    made.driver(True)
    made.gpus((9, 0))
    made.nvrtc(True)
    made.archive({})
    return made


def said() -> str:
    found = state.state()
    text = state.describe(found)
    assert found["usable"] == ("not usable" not in text)
    return text


def test_no_driver(machine):
    machine.driver(False)
    assert said() == (
        "not usable: NVIDIA's driver is not installed (libcuda.so.1: no such file); NVRTC 13.0 would be used with it"
    )
    machine.nvrtc(False)
    machine.archive({"a": ["80"]})
    assert said().endswith("no such file); 1 compiled kernels would be used with it")


def test_a_driver_and_nothing_to_compile_with(machine):
    machine.nvrtc(False)
    assert said().startswith(
        "sm_90: not usable: NVRTC was not found, and this installation holds no code for sm_90"
    )
    assert "MEGALITE_CUDA_BUILD=1" in said()


def test_torch_without_cuda(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert said() == "not usable: torch is built without CUDA, though the driver is there (CUDA 13.0)"


def test_an_old_gpu(machine):
    machine.gpus((7, 5))
    assert said() == "sm_75: not usable: CUDA kernels need sm_80 or later, this is sm_75"


def test_nvrtc(machine):
    assert said().startswith("sm_90: all compiled at first use by NVRTC 13.0, kept in ")


def test_cubins_and_nvrtc(machine):
    machine.archive({sources.identity(FIRST): ["80", "90a"]})
    assert said().startswith(
        "sm_90: 1 of 2 compiled when installed (nvcc 13.0.88), the others compiled at first"
    )


def test_all_cubins_without_nvrtc(machine):
    machine.nvrtc(False)
    machine.archive({sources.identity(kernel): ["90a"] for kernel in (FIRST, SECOND)})
    assert said() == "sm_90: 2 of 2 compiled when installed (nvcc 13.0.88)"


def test_ptx_alone(machine):
    machine.nvrtc(False)
    machine.gpus((12, 0))
    machine.archive({sources.identity(kernel): ["90a"] for kernel in (FIRST, SECOND)}, ptx="80")
    assert said() == "sm_120: all from PTX (nvcc 13.0.88) by the driver; NVRTC was not found"


def test_gpus_of_one_kind_are_named_once(machine):
    machine.gpus((9, 0), (9, 0), (8, 0))
    assert said().count("sm_90:") == said().count("sm_80:") == 1


def test_emulation(machine, monkeypatch):
    monkeypatch.setenv(runtime.EMULATE, "90")
    assert said() == "emulated on the CPU as sm_90 (MEGALITE_CUDA_EMULATE), for tests: very slow"


def test_the_environment_of_the_doctor_has_it(machine):
    lines = dict(environment.describe(environment.facts()))
    assert lines["CUDA kernels"] == said()
