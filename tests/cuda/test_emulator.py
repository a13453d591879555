"""The emulator of CUDA kernels: right numbers from kernels that are right, and an error from each that is not."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
from pathlib import Path

import pytest
import torch

from megalite_kernels.native.cuda import emulated_build
from megalite_kernels.native.cuda.emulated import EmulationError, reporting
from megalite_kernels.native.cuda.kernel import Kernel, instance
from megalite_kernels.native.cuda.runtime import launch

KERNELS = Path(__file__).parent / "kernels"
CPU = torch.device("cpu")
ELEMENTS = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}


@pytest.mark.parametrize("dtype", ELEMENTS, ids=ELEMENTS.values())
@pytest.mark.parametrize("seed", ["0", "1"])
def test_sums_of_rows(dtype: torch.dtype, seed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALITE_CUDA_EMULATE_SEED", seed)
    kernel = instance(
        str(KERNELS / "good.cuh"), "row_sums", threads=128, shared_bytes=16, ELEMENT=ELEMENTS[dtype]
    )
    x = torch.randn(5, 1024).to(dtype)
    sums = torch.empty(5)
    with reporting() as reports:
        launch(kernel, (5, 1, 1), [x, sums, 1024, 0.5], CPU)
    torch.testing.assert_close(sums, x.double().sum(1).mul(0.5).float(), rtol=1e-5, atol=1e-5)
    assert reports[0].global_read_bytes == x.numel() * x.element_size()
    assert reports[0].global_written_bytes == sums.numel() * 4
    assert reports[0].bank_conflicts == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_product_of_tiles(dtype: torch.dtype) -> None:
    kernel = instance(
        str(KERNELS / "good.cuh"), "tile_product", threads=32, shared_bytes=768, ELEMENT=ELEMENTS[dtype]
    )
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.empty(16, 8)
    launch(kernel, (1, 1, 1), [a, b, c], CPU)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_arguments_are_checked() -> None:
    kernel = instance(str(KERNELS / "good.cuh"), "row_sums", threads=128, shared_bytes=16, ELEMENT="float")
    x, sums = torch.randn(1, 1024), torch.empty(1)
    with pytest.raises(EmulationError, match="takes 4 parameters, and was given 3"):
        launch(kernel, (1, 1, 1), [x, sums, 1024], CPU)
    with pytest.raises(EmulationError, match="parameter 3 is float, and was given int"):
        launch(kernel, (1, 1, 1), [x, sums, 1024, 1], CPU)


def _good(name: str, threads: int = 32, **options: int) -> Kernel:
    return instance(str(KERNELS / "good.cuh"), name, threads=threads, **options)


def test_conversions_round_as_torch_does() -> None:
    """Every half, the values halfway between two, what lies beside those, and random bits."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    every = every[every.isfinite()].unique()
    halfway = (every[1:] + every[:-1]) / 2
    beside = [torch.nextafter(halfway, torch.tensor(end)) for end in (math.inf, -math.inf)]
    bits = torch.randint(-(2**31), 2**31, (20000,)).int().view(torch.float32)
    x = torch.cat(
        [every, halfway, *beside, bits, torch.tensor([65519.0, 65520.0, 1e-45, math.inf, -math.inf])]
    )
    n = len(x)
    b, h = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.float16)
    from_b, from_h = torch.empty(n), torch.empty(n)
    launch(_good("conversions", 256), (-(-n // 256), 1, 1), [x, b, h, from_b, from_h, n], CPU)
    for got, back, dtype in ((b, from_b, torch.bfloat16), (h, from_h, torch.float16)):
        torch.testing.assert_close(got, x.to(dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(back, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_exchanges_within_a_warp() -> None:
    x, y = torch.arange(32.0), torch.empty(11, 32)
    launch(_good("shuffles"), (1, 1, 1), [x, y], CPU)
    lane = torch.arange(32)
    votes = sum(1 << i for i in range(0, 32, 3))
    expected = [
        torch.full((32,), 7),
        lane // 8 * 8 + (lane ^ 3) % 8,
        lane ^ 16,
        torch.where(lane >= 3, lane - 3, lane),
        torch.where(lane % 8 >= 3, lane - 3, lane),
        torch.where(lane < 27, lane + 5, lane),
        torch.where(lane % 16 < 11, lane + 5, lane),
        torch.full((32,), votes >> 8),
        torch.ones(32),
        torch.zeros(32),
        torch.where(lane < 16, lane ^ 1, lane ^ 2),
    ]
    assert torch.equal(y, torch.stack([one.float() for one in expected]))


@pytest.mark.parametrize(("way", "sectors"), [(0, 2 * 32 * 4), (1, 2 * 32 * 32)])
def test_sectors_of_global_memory(way: int, sectors: int) -> None:
    """A row of 32 floats is four sectors; of a column, each float lies in one of its own."""
    x, y = torch.randn(32, 32), torch.empty(32, 32)
    with reporting() as reports:
        launch(_good("columns", WAY=way), (1, 1, 1), [x, y], CPU)
    assert torch.equal(x, y)
    assert reports[0].global_read_bytes + reports[0].global_written_bytes == 2 * 32 * 32 * 4
    assert reports[0].global_sectors == sectors


def test_views_and_empty_launches() -> None:
    """A view's own elements are all that a kernel may touch, and what lies between them is kept."""
    kernel = _good("columns", WAY=0)
    x, whole = torch.randn(32, 32), torch.full((34, 32), 7.0)
    launch(kernel, (1, 1, 1), [x, whole[1:33]], CPU)
    assert torch.equal(whole[1:33], x)
    assert (whole[0] == 7).all()
    assert (whole[33] == 7).all()
    with pytest.raises(EmulationError, match="argument 0, whose tensor has 3968"):
        launch(kernel, (1, 1, 1), [x[:31], whole[1:33]], CPU)
    launch(kernel, (0, 1, 1), [x[:31], whole], CPU)


def test_a_failed_launch_writes_nothing() -> None:
    x, y = torch.randn(31, 32), torch.zeros(32, 32)
    with pytest.raises(EmulationError, match="reads 4 bytes"):
        launch(_good("columns", WAY=0), (1, 1, 1), [x, y], CPU)
    assert not y.any()


def test_fibers_by_ucontext(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that processors other than x86-64 take."""
    monkeypatch.setattr(
        emulated_build, "RUNTIME_FLAGS", [*emulated_build.RUNTIME_FLAGS, "-DEMULATE_UCONTEXT"]
    )
    emulated_build._load.cache_clear()
    test_exchanges_within_a_warp()
    test_product_of_tiles(torch.bfloat16)
    emulated_build._load.cache_clear()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    emulated_build._compiler.cache_clear()
    emulated_build._compiler_version.cache_clear()
    with pytest.raises(emulated_build.BuildError, match=r"needs g\+\+"):
        launch(_good("columns", WAY=0, EXTRA=1), (1, 1, 1), [torch.empty(32, 32), torch.empty(32, 32)], CPU)
    emulated_build._compiler.cache_clear()


def test_what_does_not_compile_is_said() -> None:
    with pytest.raises(emulated_build.BuildError, match="no_such_kernel"):
        launch(_good("no_such_kernel"), (1, 1, 1), [], CPU)


def test_processes_that_build_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets a whole library, and nothing else is left in the folder."""
    monkeypatch.setenv(emulated_build.CACHE, str(tmp_path))
    build = [["-fPIC"], "int one() { return 1; }\n", Path("one.cpp"), [], "one"]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=emulated_build._build, args=build) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    (made,) = tmp_path.iterdir()
    assert ctypes.CDLL(str(made))._Z3onev() == 1
