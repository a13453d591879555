"""Hopper's asynchronous instructions in the emulator: products by TMA, mbarriers and wgmma, and what it must catch.

The maps of single instructions are compared with CuTe's in test_layouts.py. Not tested here, or by any emulation: the
assembly in ptx_hopper.cuh.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalite_kernels.native.cuda.emulated import EmulationError
from megalite_kernels.native.cuda.kernel import Kernel, TensorMap, instance
from megalite_kernels.native.cuda.runtime import launch

SOURCE = Path(__file__).parent / "kernels" / "hopper.cuh"
CPU = torch.device("cpu")
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
SEED = "MEGALITE_CUDA_EMULATE_SEED"
STAGES = 2
TILE = 64
"""Rows of a block, and the depth of a stage."""
BUGS = re.findall(r"^  ([A-Z_]+),?\s", SOURCE.read_text(encoding="utf-8").split("enum Bug")[1], re.MULTILINE)


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, whose products and sums are exact in every order."""
    return torch.randint(-4, 5, shape).to(dtype)


def product_kernel(
    columns: int, swizzle: int, trans_a: int, trans_b: int, registers: int, dtype: torch.dtype
) -> Kernel:
    stage = (TILE + columns) * TILE * 2
    return instance(
        str(SOURCE),
        "product",
        threads=256,
        shared_bytes=STAGES * stage + TILE * columns * 2 + STAGES * 16 + 1024,
        target="sm_90a",
        ELEMENT=ELEMENTS[dtype],
        COLUMNS=columns,
        STAGES=STAGES,
        SWIZZLE=swizzle,
        TRANS_A=trans_a,
        TRANS_B=trans_b,
        A_REGISTERS=registers,
    )


def operand_map(x: Tensor, transposed: int, rows: int, swizzle: int) -> TensorMap:
    """The map of x [rows, depth], stored so or (transposed) as [depth, rows], in boxes as wide as the swizzle."""
    wide = swizzle // 2 or 8
    outer, inner = x.shape
    return TensorMap(x, (inner, outer), (inner * 2,), (wide, TILE if transposed else rows), swizzle)


def multiply(kernel: Kernel, a: Tensor, b: Tensor, trans_a: int, trans_b: int, bug: str = "NONE") -> Tensor:
    """C = A B' by the kernel; a [M, K] and b [N, K], handed over transposed where the options say so."""
    defines = dict(kernel.defines)
    columns, swizzle = int(defines["COLUMNS"]), int(defines["SWIZZLE"])
    stored = [x.t().contiguous() if trans else x for x, trans in ((a, trans_a), (b, trans_b))]
    c = torch.empty(a.shape[0], b.shape[0], dtype=a.dtype)
    maps = [
        operand_map(stored[0], trans_a, TILE, swizzle),
        operand_map(stored[1], trans_b, columns, swizzle),
        TensorMap(c, (c.shape[1], c.shape[0]), (c.shape[1] * 2,), (columns, TILE)),
    ]
    grid = (b.shape[0] // columns, a.shape[0] // TILE, 1)
    launch(kernel, grid, [*maps, a, a.shape[1] // TILE, BUGS.index(bug)], CPU)
    return c


@pytest.mark.parametrize(
    ("columns", "swizzle", "trans_a", "trans_b", "registers", "dtype"),
    [
        (64, 128, 0, 0, 0, torch.bfloat16),
        (128, 64, 0, 1, 1, torch.float16),
        (256, 32, 1, 0, 0, torch.bfloat16),
        (64, 0, 1, 1, 0, torch.float16),
    ],
)
def test_products(
    columns: int, swizzle: int, trans_a: int, trans_b: int, registers: int, dtype: torch.dtype
) -> None:
    kernel = product_kernel(columns, swizzle, trans_a, trans_b, registers, dtype)
    a, b = numbers(64, 192, dtype=dtype), numbers(columns, 192, dtype=dtype)
    for way in ("NONE", "REWRITTEN"):
        c = multiply(kernel, a, b, trans_a, trans_b, way)
        assert torch.equal(c, (a.float() @ b.float().t()).to(dtype))


@pytest.mark.parametrize("seed", range(8))
def test_every_order_gives_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SEED, str(seed))
    kernel = product_kernel(64, 128, 0, 0, 0, torch.bfloat16)
    a, b = numbers(128, 320, dtype=torch.bfloat16), numbers(64, 320, dtype=torch.bfloat16)
    assert torch.equal(multiply(kernel, a, b, 0, 0), (a.float() @ b.float().t()).bfloat16())


ERRORS = {
    "NO_WAIT": r"wgmma \([AB]\).*asynchronous copy is still to write|race on shared memory.*wgmma",
    "WRONG_PHASE": r"asynchronous copy is still to write|race on shared memory|deadlock.*mbarrier_wait",
    "FEW_BYTES": "must name all bytes",
    "UNREAD_TILE": "nobody has waited for what TMA loads",
    "MANY_BYTES": "deadlock.*mbarrier_wait",
    "NO_EMPTY_WAIT": r"tma_load.*(still reads|writes too|race on shared memory)|race on shared memory.*tma_load|"
    "the phase already has its",
    "EARLY_RELEASE": r"tma_load.*still reads|race on shared memory.*tma_load",
    "READ_AFTER_RELEASE": "race on shared memory.*tma_load.*read of thread|this read.*a TMA load|still to write",
    "STORE_WITHOUT_FENCE": r"wgmma \(B\).*wrote by an ordinary store.*fence_async_shared",
    "STORE_WITHOUT_BARRIER": r"race on shared memory.*wgmma|this write.*a wgmma|under way still reads",
    "TOUCHED_AFTER_FENCE": "accessed after the last wgmma_fence",
    "NO_WGMMA_FENCE": "without a wgmma_fence",
    "READ_BEFORE_WAIT": "touches element 1 of an accumulator",
    "NO_COMMIT": "touches element .* of an accumulator|tma_load.*product under way still reads",
    "NO_ASYNC_FENCE": r"tma_store.*wrote by an ordinary store.*fence_async_shared",
    "NO_STORE_BARRIER": r"race on shared memory.*tma_store|tma_store.*nothing has written|under way still reads",
    "NO_STORE_WAIT": "leaves the kernel while TMA stores still read",
    "STORE_OVERWRITTEN": "under way still reads|race on shared memory",
    "NO_INIT_FENCE": "without fence_mbarrier_init",
    "NO_INIT_BARRIER": "where no mbarrier_init was|race on shared memory",
    "ABSENT_WARP": "deadlock.*another warp of the group|other descriptors",
    "OTHER_DESCRIPTOR": "other descriptors",
    "MISALIGNED_TILE": "must be a multiple of 1024",
    "BARRIER_IN_TILE": "over the mbarrier at byte",
}
"""What the emulator says of each mistake."""
WRONG_NUMBERS = ["WRONG_SWIZZLE", "WRONG_STRIDE"]


def test_every_mistake_is_listed() -> None:
    assert {*ERRORS, *WRONG_NUMBERS, "NONE", "REWRITTEN"} == set(BUGS)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bug", ERRORS)
def test_mistakes_are_caught(bug: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SEED, str(seed))
    kernel = product_kernel(64, 128, 0, 0, 0, torch.bfloat16)
    a, b = numbers(64, 320, dtype=torch.bfloat16), numbers(64, 320, dtype=torch.bfloat16)
    with pytest.raises(EmulationError, match=ERRORS[bug]):
        multiply(kernel, a, b, 0, 0, bug)


@pytest.mark.parametrize("bug", WRONG_NUMBERS)
def test_wrong_descriptors_give_wrong_numbers(bug: str) -> None:
    kernel = product_kernel(64, 128, 0, 0, 0, torch.bfloat16)
    a, b = numbers(64, 128, dtype=torch.bfloat16), numbers(64, 128, dtype=torch.bfloat16)
    try:
        c = multiply(kernel, a, b, 0, 0, bug)
    except EmulationError:
        return  # bytes were read that nothing had written
    assert not torch.equal(c, (a.float() @ b.float().t()).bfloat16())


def test_cluster() -> None:
    kernel = instance(str(SOURCE), "cluster_sums", threads=32, shared_bytes=16, cluster=4, target="sm_90a")
    kernel = with_product_defines(kernel)
    x, sums = torch.arange(8.0), torch.empty(8)
    launch(kernel, (8, 1, 1), [x, sums], CPU)
    weights = torch.arange(1.0, 5.0)
    expected = (x.reshape(2, 4) * weights).sum(1, keepdim=True) + 1000 * torch.arange(4.0)
    assert torch.equal(sums, expected.reshape(-1))


def with_product_defines(kernel: Kernel, **defines: int) -> Kernel:
    """The file's other kernels need its defines too."""
    options = {"ELEMENT": "bf16", "COLUMNS": 64, "STAGES": 2, "SWIZZLE": 128}
    options |= {"TRANS_A": 0, "TRANS_B": 0, "A_REGISTERS": 0, **defines}
    return instance(
        kernel.source,
        kernel.name,
        threads=kernel.threads,
        shared_bytes=kernel.shared_bytes,
        cluster=kernel.cluster,
        target=kernel.target,
        **options,
    )


@pytest.mark.parametrize("dims", [3, 4])
def test_boxes_that_reach_out_of_bounds(dims: int) -> None:
    """What lies outside comes in as zeros, and is not written."""
    shape = (3, 4, 5, 16)[4 - dims :]  # outermost first
    box = (2, 1, 4, 8)[4 - dims :]
    at = [-3, 2, 3, -1][:dims]  # innermost first
    x, y = torch.randn(*shape), torch.zeros(*shape)
    strides = tuple(stride * 4 for stride in reversed(x.stride()[:-1]))
    maps = [TensorMap(tensor, shape[::-1], strides, box[::-1]) for tensor in (x, y)]
    line = torch.randint(0, 2**31 - 1, (16,), dtype=torch.int32)
    count = 1
    for side in box:
        count *= side
    words = torch.empty(count + 16, dtype=torch.int32)
    kernel = instance(str(SOURCE), "copies", threads=32, shared_bytes=128 + count * 4 + 64, target="sm_90a")
    arguments = [*maps, line, count * 4, 64, *at, *[0] * (4 - dims), words]
    launch(with_product_defines(kernel, DIMS=dims), (1, 1, 1), arguments, CPU)
    expected, written = torch.zeros(*box), torch.zeros(*shape)
    for place in torch.cartesian_prod(*(torch.arange(side) for side in box)).tolist():
        index = tuple(first + step for first, step in zip(reversed(at), place, strict=True))
        if all(0 <= i < side for i, side in zip(index, shape, strict=True)):
            expected[tuple(place)] = x[index]
            written[index] = x[index]
    assert torch.equal(words[:count].view(torch.float32), expected.reshape(-1))
    assert torch.equal(words[count:], line)
    assert torch.equal(y, written)
    assert 0 < int((expected != 0).sum()) < count
