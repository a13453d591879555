"""The emulator of CUDA kernels: right numbers from kernels that are right, and an error from each that is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalite_kernels.native.cuda.emulated import EmulationError, reporting
from megalite_kernels.native.cuda.kernel import instance
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
