"""Every map of the emulated matrix instructions against CuTe's own, which a small C++ program evaluates on the host.

Kernels, emulator and tests were written from the same manual by the same hand; CUTLASS was not. Each test feeds
fragments, images of shared memory and descriptors that CuTe's layouts describe to one emulated instruction.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megalite_kernels.native.cuda import emulated_build
from megalite_kernels.native.cuda.kernel import TensorMap, instance
from megalite_kernels.native.cuda.runtime import launch

KERNELS = Path(__file__).parent / "kernels"
SOURCE = str(KERNELS / "layouts.cuh")
CPU = torch.device("cpu")
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
SWIZZLES = (0, 32, 64, 128)


def headers() -> list[Path]:
    """Folders of CUTLASS's headers and of the CUDA runtime's that they include; empty if a package is missing."""
    cutlass, nvidia = (importlib.util.find_spec(name) for name in ("cutlass_library", "nvidia"))
    if cutlass is None or cutlass.origin is None or nvidia is None:
        return []
    folders = [Path(cutlass.origin).parent / "source" / "include"]
    for package in nvidia.submodule_search_locations or ():
        for runtime in Path(package).glob("*/include/cuda_runtime.h"):
            folders += [runtime.parent, runtime.parent / "cccl"]
    return folders if len(folders) > 1 and shutil.which("g++") else []


pytestmark = [
    pytest.mark.skipif(
        not headers(),
        reason="CuTe's layouts need g++ and the packages nvidia-cutlass, nvidia-cuda-runtime and -cccl",
    ),
    pytest.mark.timeout(600),  # CuTe's headers are long
]


def printed(folder: Path) -> str:
    """What cute_layouts.cpp prints; kept beside the emulator's kernels, as CuTe takes g++ ten seconds."""
    source = KERNELS / "cute_layouts.cpp"
    version = importlib.metadata.version("nvidia-cutlass")
    key = hashlib.sha256(f"{version}\n{source.read_text(encoding='utf-8')}".encode()).hexdigest()[:20]
    kept = emulated_build._cache() / f"cute_layouts-{key}.txt"
    if not kept.is_file():
        program, includes = str(folder / "layouts"), [f"-I{path}" for path in headers()]
        subprocess.run(["g++", "-std=c++17", "-O0", "-w", *includes, str(source), "-o", program], check=True)
        output = subprocess.run([program], check=True, capture_output=True).stdout
        kept.parent.mkdir(parents=True, exist_ok=True)
        (folder / kept.name).write_bytes(output)
        shutil.move(folder / kept.name, kept)
    return kept.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cute(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """CuTe's maps by name."""
    lines = printed(tmp_path_factory.mktemp("cute")).splitlines()
    return {
        name: np.array([int(value) for value in values.split()], np.uint64).astype(np.int64)
        for name, values in (line.split(" ", 1) for line in lines)
    }


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, whose products and sums are exact in every order."""
    return torch.randint(-8, 9, shape).to(dtype)


def words(values: Tensor) -> Tensor:
    """16-bit elements, by pairs, as int32."""
    return values.contiguous().view(torch.int32)


def gather(matrix: Tensor, fragment: np.ndarray, threads: int) -> Tensor:
    """[threads, values]: what each thread holds of a matrix, by CuTe's map (first mode of the matrix fastest)."""
    return matrix.t().reshape(-1)[torch.from_numpy(fragment)].reshape(threads, -1)


def scatter(values: Tensor, fragment: np.ndarray, rows: int, columns: int) -> Tensor:
    """The matrix of which each thread holds `values`, by CuTe's map."""
    flat = torch.full((rows * columns,), float("nan"))
    flat[torch.from_numpy(fragment)] = values.reshape(-1)
    return flat.reshape(columns, rows).t()


@pytest.mark.parametrize("dtype", ELEMENTS, ids=ELEMENTS.values())
def test_mma_m16n8k16(cute: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    a, b = numbers(16, 16, dtype=dtype), numbers(8, 16, dtype=dtype)
    d = torch.empty(32, 4)
    kernel = instance(SOURCE, "mma_fragments", threads=32, ELEMENT=ELEMENTS[dtype])
    fragments = [words(gather(a, cute["mma_a"], 32)), words(gather(b, cute["mma_b"], 32))]
    launch(kernel, (1, 1, 1), [*fragments, d], CPU)
    assert torch.equal(scatter(d, cute["mma_c"], 16, 8), a.float() @ b.float().t())


@pytest.mark.parametrize("transposed", [0, 1])
def test_ldmatrix(cute: dict[str, np.ndarray], transposed: int) -> None:
    rows, registers = (
        torch.randint(0, 2**15, (32, 8), dtype=torch.int16),
        torch.empty(32, 4, dtype=torch.int32),
    )
    kernel = instance(SOURCE, "ldmatrix_fragments", threads=32, shared_bytes=512, TRANSPOSED=transposed)
    launch(kernel, (1, 1, 1), [rows.view(torch.int32), registers], CPU)
    map_ = cute["ldmatrix_x4_transposed" if transposed else "ldmatrix_x4"]
    assert torch.equal(registers.view(torch.int16).reshape(-1), rows.reshape(-1)[torch.from_numpy(map_)])


@pytest.mark.parametrize("transposed", [0, 1])
def test_stmatrix(cute: dict[str, np.ndarray], transposed: int) -> None:
    registers = torch.randint(0, 2**15, (32, 8), dtype=torch.int16)
    rows = torch.empty(32, 4, dtype=torch.int32)
    kernel = instance(
        SOURCE, "stmatrix_fragments", threads=32, shared_bytes=512, target="sm_90a", TRANSPOSED=transposed
    )
    launch(kernel, (1, 1, 1), [registers.view(torch.int32), rows], CPU)
    map_ = cute["stmatrix_x4_transposed" if transposed else "stmatrix_x4"]
    assert torch.equal(rows.view(torch.int16).reshape(-1)[torch.from_numpy(map_)], registers.reshape(-1))


def image(tile: Tensor, places: np.ndarray) -> Tensor:
    """Shared memory that holds `tile` [MN, K] with every element at CuTe's byte, as words."""
    memory = torch.zeros(tile.numel(), dtype=tile.dtype)
    memory[torch.from_numpy(places // 2)] = tile.reshape(-1)
    return words(memory)


@functools.cache
def product_kernel(dtype: torch.dtype, n: int, trans_a: int, trans_b: int):
    return instance(
        SOURCE,
        "wgmma_shared",
        threads=128,
        shared_bytes=64 << 10,
        target="sm_90a",
        ELEMENT=ELEMENTS[dtype],
        COLUMNS=n,
        TRANS_A=trans_a,
        TRANS_B=trans_b,
    )


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize(
    ("trans_a", "trans_b", "dtype"), [(0, 0, torch.bfloat16), (1, 1, torch.float16), (0, 1, torch.bfloat16)]
)
def test_wgmma_of_shared_operands(
    cute: dict[str, np.ndarray], swizzle: int, trans_a: int, trans_b: int, dtype: torch.dtype
) -> None:
    """Tiles where CuTe puts them, through the descriptors that CuTe makes: K-major and transposed, each swizzle."""
    names = [f"{'mn' if transposed else 'k'}_major_{swizzle}" for transposed in (trans_a, trans_b)]
    tiles = [numbers(128, 64, dtype=dtype) for _ in names]
    images = [image(tile, cute[name]) for tile, name in zip(tiles, names, strict=True)]
    descriptors = [torch.from_numpy(cute[f"{name}_descriptors"]) for name in names]
    d = torch.empty(128, 64)
    arguments = []
    for memory, bits in zip(images, descriptors, strict=True):
        arguments += [memory, memory.numel(), bits]
    launch(product_kernel(dtype, 128, trans_a, trans_b), (1, 1, 1), [*arguments, 4, d], CPU)
    got = scatter(d, cute["wgmma_c128"], 64, 128)
    assert torch.equal(got, tiles[0][:64].float() @ tiles[1].float().t())


@pytest.mark.parametrize("n", [64, 192, 256])
def test_wgmma_of_registers(cute: dict[str, np.ndarray], n: int) -> None:
    """A's fragment, and accumulators of other N; B without a swizzle, its rows of 8 stacked to N."""
    a, b = numbers(64, 16, dtype=torch.bfloat16), numbers(n, 16, dtype=torch.bfloat16)
    # Cores of 8 rows of 16 bytes: chunk k of K at k * n * 16, groups of 8 rows 128 bytes apart.
    memory = words(b.reshape(n // 8, 8, 2, 8).permute(2, 0, 1, 3))
    bits = torch.tensor([(n * 16 >> 4) << 16 | (128 >> 4) << 32])
    d = torch.empty(128, n // 2)
    kernel = instance(
        SOURCE,
        "wgmma_registers",
        threads=128,
        shared_bytes=16 << 10,
        target="sm_90a",
        ELEMENT="bf16",
        COLUMNS=n,
        TRANS_B=0,
    )
    launch(kernel, (1, 1, 1), [words(gather(a, cute["wgmma_a"], 128)), memory, memory.numel(), bits, d], CPU)
    assert torch.equal(scatter(d, cute[f"wgmma_c{n}"], 64, n), a.float() @ b.float().t())


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("major", ["k", "mn"])
def test_descriptors_are_cutes(cute: dict[str, np.ndarray], swizzle: int, major: str) -> None:
    """`wgmma_descriptor` of a step's first byte and its two offsets gives the bits of CuTe's `make_gmma_desc`."""
    kernel = instance(SOURCE, "descriptor_bits", threads=32, shared_bytes=64 << 10, target="sm_90a")
    for bits in cute[f"{major}_major_{swizzle}_descriptors"].tolist():
        offset, leading, stride = (bits >> shift & 0x3FFF for shift in (0, 16, 32))
        got = torch.empty(1, dtype=torch.int64)
        launch(kernel, (1, 1, 1), [offset * 16, leading * 16, stride * 16, swizzle, got], CPU)
        assert got.item() == bits


@pytest.mark.parametrize("swizzle", SWIZZLES[1:])
@pytest.mark.parametrize("major", ["k", "mn"])
def test_tma_writes_what_wgmma_reads(cute: dict[str, np.ndarray], swizzle: int, major: str) -> None:
    """A box as wide as the swizzle lands as the first columns of CuTe's tile, and leaves again in order."""
    wide = swizzle // 2
    name = f"{major}_major_{swizzle}"
    rows, columns = (128, wide) if major == "k" else (8, wide)
    x = torch.randint(0, 2**15, (rows, columns + 8), dtype=torch.int16).view(torch.bfloat16)
    back = torch.zeros(rows, columns + 8, dtype=torch.bfloat16)
    maps = [
        TensorMap(tensor, (columns + 8, rows), ((columns + 8) * 2,), (wide, rows), swizzle)
        for tensor in (x, back)
    ]
    count = rows * wide // 2
    memory = torch.empty(count, dtype=torch.int32)
    kernel = instance(SOURCE, "tma_image", threads=32, shared_bytes=count * 4 + 16, target="sm_90a")
    launch(kernel, (1, 1, 1), [*maps, 8, 0, count, memory], CPU)
    places = cute[name].reshape(128, 64)
    places = places[:, :wide] if major == "k" else places[:wide, :8].T
    got = memory.view(torch.int16)[torch.from_numpy(places // 2)]
    assert torch.equal(got, x.view(torch.int16)[:, 8:])
    assert torch.equal(back[:, 8:].view(torch.int16), x.view(torch.int16)[:, 8:])
    assert torch.all(back[:, :8] == 0)
