"""Loading and launching, against a libcuda that writes down what it is asked, in the types of NVIDIA's cuda.h."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from megalite_kernels.native.cuda import binaries, driver, libcuda
from megalite_kernels.native.cuda.kernel import TensorMap, instance

CXX = os.environ.get("CXX", "c++")
INVALID_VALUE = 1
DEVICE = torch.device("cuda", 0)
KERNEL = instance("any.cuh", "any", threads=128, BLOCK=64)
CONTEXT = 16 * 100
"""Of the stand-in's device 0."""


def cuda_include() -> Path | None:
    """Folder of cuda.h: of the pip packages, else of an installed toolkit."""
    folders = [Path(entry) / "nvidia" / "cu13" / "include" for entry in sys.path]
    folders.append(Path("/usr/local/cuda/include"))
    return next((folder for folder in folders if (folder / "cuda.h").is_file()), None)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    include = cuda_include()
    if include is None or shutil.which(CXX) is None:
        pytest.skip("needs a C++ compiler and cuda.h (pip install nvidia-cuda-runtime)")
    output = tmp_path_factory.mktemp("standin") / "libcuda.so"
    source = Path(__file__).with_name("standin_libcuda.cpp")
    subprocess.run(
        [CXX, "-std=c++17", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(output)], check=True
    )
    loaded = ctypes.CDLL(str(output))
    loaded.standin_record.restype = ctypes.c_char_p
    return loaded


class StandIn:
    """What a test asks of the stand-in."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def lines(self, name: str = "") -> list[str]:
        lines = self.library.standin_record().decode().splitlines()
        return [line.strip() for line in lines if line.startswith(name)]

    def expect(self, layout: str) -> None:
        """Forget what was written down; parameters are of these types."""
        self.library.standin_reset(layout.encode())

    def fail(self, name: str, status: int) -> None:
        self.library.standin_fail(name.encode(), status)


@pytest.fixture
def cuda(library, monkeypatch):
    """The driver is the stand-in, nothing is loaded, the current stream of device n is 0x5000 + n."""
    standin = StandIn(library)
    standin.expect("")
    found = libcuda.Driver(library)
    monkeypatch.setattr(libcuda, "driver", lambda: found)
    for name in ("_devices", "_loaded", "_maps"):
        monkeypatch.setattr(driver, name, {})
    monkeypatch.setattr(driver, "_stream", lambda index: 0x5000 + index)
    monkeypatch.setattr(binaries, "find", lambda *_: binaries.Binary(b"code", "a test"))
    return standin


def test_every_kind_of_argument_arrives(cuda):
    tensor = torch.zeros(4)
    cuda.expect("qqqqff")
    driver.launch(KERNEL, (3, 2, 1), [tensor, None, -(2**62), 7, 1.5, 0.1], DEVICE)
    assert cuda.lines("cuLaunchKernelEx") == [
        (
            "cuLaunchKernelEx 3,2,1 128,1,1 shared 0 stream 20480 function 153 context "
            f"{CONTEXT} with {tensor.data_ptr()} 0 {-(2**62)} 7 1.5 0.100000001"
        )
    ]


def test_a_kernel_without_parameters(cuda):
    driver.launch(KERNEL, (1, 1, 1), [], DEVICE)
    assert cuda.lines("cuLaunchKernelEx")[0].endswith("with")


def test_a_kernel_is_loaded_once_per_device_in_its_context(cuda):
    for index in (0, 1, 0, 1):
        driver.launch(KERNEL, (1, 1, 1), [], torch.device("cuda", index))
    assert cuda.lines("cuModuleLoadDataEx") == ["cuModuleLoadDataEx code relaxed"] * 2
    assert cuda.lines("cuModuleGetFunction") == ["cuModuleGetFunction 119 any"] * 2
    contexts = [line.split("context ")[1].split()[0] for line in cuda.lines("cuLaunchKernelEx")]
    streams = [line.split("stream ")[1].split()[0] for line in cuda.lines("cuLaunchKernelEx")]
    assert contexts == ["1600", "1616"] * 2
    assert streams == ["20480", "20481"] * 2
    assert cuda.lines("cuDevicePrimaryCtxRetain") == [
        "cuDevicePrimaryCtxRetain 100",
        "cuDevicePrimaryCtxRetain 101",
    ]


def test_the_threads_context_is_put_back(cuda):
    driver.launch(KERNEL, (1, 1, 1), [], DEVICE)
    assert len(cuda.lines("cuCtxPushCurrent")) == len(cuda.lines("cuCtxPopCurrent")) == 2


def test_a_thread_in_the_context_stays_in_it(cuda, library):
    driver.load(KERNEL, 0)
    library.cuCtxPushCurrent_v2(ctypes.c_void_p(CONTEXT))
    cuda.expect("")
    try:
        driver.launch(KERNEL, (1, 1, 1), [], DEVICE)
        assert [line.split()[0] for line in cuda.lines()] == ["cuLaunchKernelEx"]
    finally:
        library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def test_capturing_goes_on_after_loading(cuda):
    """The thread's capture mode is relaxed for loading (2) and then what it was (0)."""
    driver.load(KERNEL, 0)
    name = "cuThreadExchangeStreamCaptureMode"
    assert cuda.lines(name) == [f"{name} 2", f"{name} 0"]
    cuda.expect("")
    driver.launch(KERNEL, (1, 1, 1), [], DEVICE)
    assert not cuda.lines(name)


def test_much_shared_memory_is_asked_for(cuda):
    driver.launch(instance("any.cuh", "any", threads=32, shared_bytes=48 << 10), (1, 1, 1), [], DEVICE)
    assert not cuda.lines("cuFuncSetAttribute")
    driver.launch(instance("any.cuh", "any", threads=32, shared_bytes=(48 << 10) + 16), (1, 1, 1), [], DEVICE)
    assert cuda.lines("cuFuncSetAttribute") == [f"cuFuncSetAttribute 153 {(48 << 10) + 16}"]
    assert " shared 49168 " in cuda.lines("cuLaunchKernelEx")[1]


def test_clusters(cuda):
    driver.launch(instance("any.cuh", "any", threads=32, cluster=4, target="sm_90"), (8, 1, 1), [], DEVICE)
    assert " cluster 4,1,1 with" in cuda.lines("cuLaunchKernelEx")[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.uint8])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_tensor_maps(cuda, dtype, swizzle):
    tensor = torch.zeros(4096, dtype=dtype)
    size = tensor.element_size()
    described = TensorMap(tensor, (64, 10, 3), (64 * size, 640 * size), (32 // size, 8, 1), swizzle)
    cuda.expect("qM")
    for _ in range(2):
        driver.launch(KERNEL, (1, 1, 1), [5, described], DEVICE)
    name = str(dtype).removeprefix("torch.")
    assert cuda.lines("cuTensorMapEncodeTiled") == [
        (
            f"cuTensorMapEncodeTiled {name} rank 3 base {tensor.data_ptr()} [64 - {32 // size} 1] "
            f"[10 {64 * size} 8 1] [3 {640 * size} 1 1] swizzle {swizzle}"
        )
    ]
    assert all(line.endswith("with 5 map4242") for line in cuda.lines("cuLaunchKernelEx"))


def test_maps_that_differ_in_anything_are_encoded_each(cuda):
    tensor = torch.zeros(4096, dtype=torch.bfloat16)
    maps = [
        TensorMap(tensor, (64, 8), (128,), (16, 8), 0),
        TensorMap(tensor, (64, 8), (128,), (16, 8), 32),
        TensorMap(tensor, (64, 8), (128,), (16, 4), 0),
        TensorMap(tensor, (64, 4), (128,), (16, 8), 0),
        TensorMap(tensor, (64, 8), (256,), (16, 8), 0),
        TensorMap(tensor[8:], (64, 8), (128,), (16, 8), 0),
        TensorMap(tensor.view(torch.float16), (64, 8), (128,), (16, 8), 0),
    ]
    for one in [*maps, *maps]:
        driver.launch(KERNEL, (1, 1, 1), [one], DEVICE)
    assert (
        len(set(cuda.lines("cuTensorMapEncodeTiled")))
        == len(cuda.lines("cuTensorMapEncodeTiled"))
        == len(maps)
    )


def test_a_refused_launch_says_what_was_launched(cuda):
    cuda.fail("cuLaunchKernelEx", INVALID_VALUE)
    with pytest.raises(RuntimeError) as caught:
        driver.launch(KERNEL, (3, 2, 1), [torch.zeros(2, 5, dtype=torch.bfloat16), 7, None], DEVICE)
    for part in (
        "any (BLOCK=64, THREADS=128)", "CUDA_ERROR_INVALID_VALUE: invalid argument (1)", "Grid (3, 2, 1)",
        "128 threads", "0 bytes of shared memory", "device 0 (sm_90)", "code from a test",
        "(2, 5) bfloat16, 7, None",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert len(cuda.lines("cuCtxPushCurrent")) == len(cuda.lines("cuCtxPopCurrent"))


def test_a_refused_module_shows_the_drivers_log(cuda):
    cuda.fail("cuModuleLoadDataEx", 209)
    with pytest.raises(
        RuntimeError, match=r"does not load for sm_90 from a test: .*\(209\): log of the driver"
    ):
        driver.launch(KERNEL, (1, 1, 1), [], DEVICE)
    modes = cuda.lines("cuThreadExchangeStreamCaptureMode")
    assert modes[-1].endswith(" 0"), "the thread's capture mode was not put back"
    cuda.expect("")
    driver.launch(KERNEL, (1, 1, 1), [], DEVICE)  # what failed is not kept
    assert cuda.lines("cuLaunchKernelEx")


def test_a_refused_tensor_map_is_described(cuda):
    cuda.fail("cuTensorMapEncodeTiled", INVALID_VALUE)
    described = TensorMap(torch.zeros(64), (8, 8), (32,), (8, 4))
    with pytest.raises(
        RuntimeError, match=r"no tensor map of shape \(8, 8\), strides \(32,\) bytes, box \(8, 4\)"
    ):
        driver.launch(KERNEL, (1, 1, 1), [described], DEVICE)


def test_what_a_device_lacks_is_said_before_compiling(cuda):
    with pytest.raises(RuntimeError, match="is for sm_100a alone, device 0 is sm_90"):
        driver.load(instance("any.cuh", "any", threads=32, target="sm_100a"), 0)
    with pytest.raises(RuntimeError, match=r"needs 220000 bytes of shared memory .* has 200000"):
        driver.load(instance("any.cuh", "any", threads=32, shared_bytes=220000), 0)
    assert not cuda.lines("cuModuleLoadDataEx")


def test_an_argument_of_another_type_is_refused(cuda):
    with pytest.raises(TypeError, match="argument 1 is a str"):
        driver.launch(KERNEL, (1, 1, 1), [1, "two"], DEVICE)


def test_many_threads_load_once(cuda):
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        driver.launch(KERNEL, (1, 1, 1), [], DEVICE)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cuda.lines("cuModuleLoadDataEx")) == 1
    assert len(cuda.lines("cuLaunchKernelEx")) == 8


def test_an_old_driver_is_named(library):
    class Old:
        def __getattr__(self, name: str) -> object:
            if name == "cuLaunchKernelEx":
                raise AttributeError(name)
            return getattr(library, name)

    with pytest.raises(RuntimeError, match="lacks cuLaunchKernelEx: it is older than CUDA 12"):
        libcuda.Driver(Old())


def test_no_driver(monkeypatch):
    monkeypatch.setattr(libcuda, "NAMES", ("libcuda-that-is-not-there.so",))
    libcuda.driver.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="NVIDIA's driver is not installed"):
            libcuda.driver()
    finally:
        libcuda.driver.cache_clear()
