"""rms_norm and layer_norm on Triton: every path of the kernels, forced by small blocks, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.triton import norm_backward, norm_forward
from megalite_kernels.triton.launch import Launch, override
from tests.helpers.margins import surrounded, surrounded_outputs
from tests.ops.catalogue import check, random
from tests.ops.test_norms import plain_layer, plain_rms

ROWS = (
    11  # with two rows a turn and four programs: two turns for most, one for the last, and a turn of one row
)
CASES = [
    (path, size, dtype)
    for path in ("rows", "loop")
    for size, dtype in (
        (1, torch.float32),
        (17, torch.float16),
        (64, torch.bfloat16),
        (64, torch.float32),
    )
]
NEVER = 1 << 30


@contextmanager
def blocks(path: str, size: int) -> Iterator[None]:
    """Launch with small blocks: "rows" in registers, or a "loop" over a row with a ragged last turn."""
    padded = 1 << (size - 1).bit_length()
    chunk = max(4, padded // 4)
    limit = {"rows": NEVER, "loop": 0}[path]
    forward = {"TILE": 2 * padded, "WARP": 32, "LIMIT": limit, "CHUNK": chunk}
    backward = {"TILE": 2 * padded, "WARP": 32, "LIMIT": limit, "CHUNK": chunk, "GROUP": 2 * padded}
    with ExitStack() as stack:
        stack.enter_context(override("norm_forward", Launch(forward)))
        stack.enter_context(override("norm_backward", Launch(backward | {"SHARED": NEVER}, 4, 2)))
        stack.enter_context(override("norm_backward_sum", Launch({"BLOCK_P": 2, "BLOCK_H": max(16, chunk)})))
        yield


def rms_with_residual(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return mk.rms_norm(x, weight, residual=residual, zero_centered=True)


def plain_rms_with_residual(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return plain_rms(x + residual, 1 + weight), x + residual


def layer_with_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return mk.layer_norm(x, weight, bias, residual=residual)


def plain_layer_with_residual(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    return plain_layer(x + residual, weight, bias), x + residual


class TestAccuracy:
    @pytest.mark.parametrize(("path", "size", "dtype"), CASES)
    def test_rms_norm(self, path: str, size: int, dtype: torch.dtype) -> None:
        with blocks(path, size):
            inputs = [random(ROWS, size), random(size, seed=1)]
            check(mk.rms_norm, plain_rms, inputs, dtype=dtype, backend="triton")

    @pytest.mark.parametrize(("path", "size", "dtype"), CASES)
    def test_rms_norm_with_residual(self, path: str, size: int, dtype: torch.dtype) -> None:
        with blocks(path, size):
            inputs = [random(ROWS, size), random(ROWS, size, seed=2), random(size, seed=1, scale=0.1)]
            check(rms_with_residual, plain_rms_with_residual, inputs, dtype=dtype, backend="triton")

    @pytest.mark.parametrize(("path", "size", "dtype"), CASES)
    def test_layer_norm(self, path: str, size: int, dtype: torch.dtype) -> None:
        with blocks(path, size):
            inputs = [random(ROWS, size) + 3, random(size, seed=1), random(size, seed=2)]
            check(mk.layer_norm, plain_layer, inputs, dtype=dtype, backend="triton", magnitude=1.0)

    @pytest.mark.parametrize(("path", "size", "dtype"), CASES)
    def test_layer_norm_with_residual(self, path: str, size: int, dtype: torch.dtype) -> None:
        with blocks(path, size):
            inputs = [random(ROWS, size, seed=s) for s in (0, 3)] + [random(size, seed=s) for s in (1, 2)]
            check(
                layer_with_residual,
                plain_layer_with_residual,
                inputs,
                dtype=dtype,
                backend="triton",
                magnitude=1.0,
            )


@pytest.mark.parametrize("path", ["rows", "loop"])
def test_long_odd_rows(path: str) -> None:
    with blocks(path, 4099):
        inputs = [random(3, 4099), random(4099, seed=1), random(4099, seed=2)]
        check(mk.rms_norm, plain_rms, inputs[:2], dtype=torch.bfloat16, backend="triton")
        check(mk.layer_norm, plain_layer, inputs, dtype=torch.float32, backend="triton")


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_as_launched_on_a_gpu(norm: str) -> None:
    """The sizes of the tables: 64 rows of 64 in a turn, and fewer there are."""
    inputs = [random(70, 64), random(64, seed=1)]
    ours, plain = (mk.rms_norm, plain_rms) if norm == "rms" else (mk.layer_norm, plain_layer)
    check(ours, plain, inputs, dtype=torch.bfloat16, backend="triton")


@pytest.mark.parametrize("path", ["rows", "loop"])
def test_a_large_mean_costs_no_digits(path: str) -> None:
    inputs = [random(5, 256) + 1000, random(256, seed=1), random(256, seed=2)]
    with blocks(path, 256):
        check(mk.layer_norm, plain_layer, inputs, dtype=torch.float32, backend="triton")
    x = inputs[0]
    x[:, :64] = 0  # the first turn says nothing about the rest
    with blocks(path, 256):
        check(mk.layer_norm, plain_layer, inputs, dtype=torch.float32, backend="triton")


@pytest.mark.parametrize("path", ["rows", "loop"])
@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_extreme_scales(scale: float, path: str) -> None:
    inputs = [random(4, 64, scale=scale), random(64, seed=1)]
    with blocks(path, 64):
        check(mk.rms_norm, plain_rms, inputs, dtype=torch.float32, backend="triton", floor=4)


@pytest.mark.parametrize("path", ["rows", "loop"])
@pytest.mark.parametrize("norm", [mk.rms_norm, mk.layer_norm])
def test_nan_stays_in_its_row(norm: Callable[..., Tensor], path: str) -> None:
    x = random(5, 20)
    x[1, 5] = torch.nan
    x.requires_grad_()
    with blocks(path, 20), mk.use_backend("triton"):
        y = norm(x, torch.ones(20))
        (dx,) = torch.autograd.grad(y.sum(), x)
    rows = torch.tensor([True, False, True, True, True])
    for result in (y, dx):
        assert torch.equal(torch.isfinite(result).all(1), rows)
        assert torch.equal(torch.isfinite(result).any(1), rows)


@pytest.mark.parametrize("path", ["rows", "loop"])
def test_same_bits_again_and_for_a_row_alone(path: str) -> None:
    x, weight = random(ROWS, 40).bfloat16().requires_grad_(), random(40, seed=1).requires_grad_()

    def run(x: Tensor) -> tuple[Tensor, ...]:
        with blocks(path, 40), mk.use_backend("triton"):
            y = mk.layer_norm(x, weight)
            return y, *torch.autograd.grad(y.float().square().sum(), [x, weight])

    first, second = run(x), run(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = run(x[7:8])
    assert torch.equal(first[0][7:8], alone[0])
    assert torch.equal(first[1][7:8], alone[1])


@pytest.mark.parametrize("path", ["rows", "loop"])
def test_nothing_outside_of_the_tensors_is_read_or_written(path: str) -> None:
    x, weight, rstd = (surrounded(t) for t in (random(ROWS, 19), random(19), torch.ones(ROWS)))
    ops = torch.ops.megalite
    with blocks(path, 19), mk.use_backend("triton"), surrounded_outputs():
        results = [
            *ops.rms_norm_fwd(x, weight, 1e-6, False),
            *ops.rms_norm_bwd(x, None, x, weight, rstd, False),
            *ops.layer_norm_residual_fwd(x, x, weight, weight, 1e-5),
            *ops.layer_norm_bwd(x, x, x, weight, rstd, rstd),
        ]
    assert all(bool(torch.isfinite(result).all()) for result in results)


def test_statistics_are_the_reference_s() -> None:
    x, weight, bias = random(3, 4, 24), random(24, seed=1), random(24, seed=2)
    for path in ("rows", "loop"):
        with blocks(path, 24):
            for op, args in (
                ("rms_norm_fwd", (x, weight, 1e-6, True)),
                ("rms_norm_residual_fwd", (x, x, weight, 1e-6, False)),
                ("layer_norm_fwd", (x, weight, bias, 1e-5)),
                ("layer_norm_residual_fwd", (x, x, weight, None, 1e-5)),
            ):
                with mk.use_backend("triton"):
                    ours = getattr(torch.ops.megalite, op)(*args)
                with mk.use_backend("reference"):
                    theirs = getattr(torch.ops.megalite, op)(*args)
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", ["rows", "loop"])
def test_fp32_weight_with_bf16_rows(path: str) -> None:
    x, weight = random(5, 32).bfloat16().requires_grad_(), random(32, seed=1).requires_grad_()
    with blocks(path, 32), mk.use_backend("triton"):
        y = mk.rms_norm(x, weight)
        dx, dweight = torch.autograd.grad(y, [x, weight], torch.ones_like(y))
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    wide, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    truth = plain_rms(wide, wide_weight)
    true_dx, true_dweight = torch.autograd.grad(truth.sum(), [wide, wide_weight])
    torch.testing.assert_close(y.double(), truth, rtol=2**-8, atol=1e-6)  # one rounding to bf16
    torch.testing.assert_close(dx.double(), true_dx, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(dweight.double(), true_dweight, rtol=1e-5, atol=1e-5)


def test_non_contiguous_and_empty() -> None:
    check(
        lambda x, w: mk.rms_norm(x.transpose(0, 1), w),
        lambda x, w: plain_rms(x.transpose(0, 1), w),
        [random(3, 4, 32), random(32, seed=1)],
        dtype=torch.bfloat16,
        backend="triton",
    )
    x, weight = torch.empty(0, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    with mk.use_backend("triton"):
        for norm in (mk.rms_norm, mk.layer_norm):
            dx, dweight = torch.autograd.grad(norm(x, weight).sum(), [x, weight])
            assert dx.shape == (0, 16)
            assert torch.equal(dweight, torch.zeros(16))


@pytest.mark.parametrize("hidden", [1, 48, 1000, 4096, 5120, 8192, 12288, 16384, 32768, 65536, 131072])
@pytest.mark.parametrize("architecture", ["default", "sm_80", "sm_90", "sm_100", "gfx942"])
def test_sizes_fit_the_device(hidden: int, architecture: str) -> None:
    lanes, most_warps = (64, 16) if architecture == "gfx942" else (32, 32)
    forward, backward = (t.entries[architecture] for t in (norm_forward.FORWARD, norm_backward.BACKWARD))
    for itemsize in (2, 4):
        config = norm_forward.forward_sizes(hidden, itemsize, forward)
        elements = config.blocks["BLOCK_T"] * config.blocks["BLOCK_H"]
        assert config.num_warps <= most_warps
        assert elements <= 32 * lanes * config.num_warps  # a thread's elements
        for tensors in (2, 3):
            config = norm_backward.backward_sizes(hidden, tensors, itemsize, backward)
            elements = config.blocks["BLOCK_T"] * config.blocks["BLOCK_H"]
            together = elements * tensors * itemsize * (config.blocks["STAGES"] - 1)
            assert together * backward.num_warps // config.num_warps <= backward.blocks["SHARED"]
            assert elements <= 16 * lanes * config.num_warps or config.num_warps == 1
            assert config.blocks["BLOCK_H"] >= hidden or config.blocks["BLOCK_T"] in (1, 2)
