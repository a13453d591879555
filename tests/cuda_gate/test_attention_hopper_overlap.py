"""In the compiled attention kernels of Hopper exponentials are taken between issuing a product and waiting for it.

ptxas moves arithmetic freely across the instruction that waits, and a kernel whose softmax follows every product is as
right as one whose softmax hides behind them.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megalite_kernels.native.cuda import build
from megalite_kernels.native.cuda.kernel import Kernel
from megalite_kernels.native.cuda.kernels import attention_hopper as kernels
from tests.cuda_gate.gate import compiler, missing_tools, sass

if missing_tools():
    pytest.skip(missing_tools(), allow_module_level=True)

LETTERS = {"HGMMA": "H", "WARPGROUP.DEPBAR": "W", "MUFU.EX2": "E"}


def shape_of(code: str) -> str:
    """The order of products, waits and exponentials in SASS, a letter each."""
    names = "|".join(map(re.escape, LETTERS))
    return "".join(LETTERS[name] for name in re.findall(rf"\s({names})(?=[.\s;])", code))


# By columns of a tile of scores: products of 16 features or rows, and two exponentials a column for each thread's rows.
@pytest.mark.parametrize(
    ("kernel", "loop"),
    [
        (
            kernels.forward("bf16", 64),
            "H{4}H{8}WE{64,}W",
        ),  # the next scores and this output; until the output is there
        (kernels.forward("bf16", 128), "H{8}H{8}WE{64,}W"),
        (
            kernels.dk_dv("bf16", 64),
            "H{4}H{4}WWE{32}H{4}W",
        ),  # scores and gradients; dv follows, then the wait for both
        (kernels.dk_dv("bf16", 128), "H{8}H{8}WWE{32}H{4}W"),
        (kernels.dq("bf16", 64), "H{4}H{4}WWE{64}W"),
        (kernels.dq("bf16", 128), "H{8}H{8}WWE{32}W"),
    ],
    ids=str,
)
def test_exponentials_are_taken_while_products_run(kernel: Kernel, loop: str, tmp_path: Path) -> None:
    nvcc, cubin = compiler(), tmp_path / "kernel.cubin"
    assert nvcc is not None
    build.compile_instance(kernel, nvcc, cubin, ["-cubin", "-arch=sm_90a"])
    found = shape_of(sass(cubin))
    assert re.search(loop, found), found


def test_the_order_is_read_from_sass() -> None:
    code = " HGMMA.64x64x16.F32.BF16 R1;\n WARPGROUP.DEPBAR.LE gsb0, 0x1 ;\n WARPGROUP.ARRIVE ;\n MUFU.EX2 R2, R3 ;\n"
    assert shape_of(code) == "HWE"
