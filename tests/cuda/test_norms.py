"""rms_norm and layer_norm on CUDA kernels, emulated: every path, forced by small blocks, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.native.cuda import rows as launchers
from megalite_kernels.native.cuda.emulated import reporting
from megalite_kernels.native.cuda.kernels import layer_norm as layer_kernels
from megalite_kernels.native.cuda.kernels import rms_norm as rms_kernels
from megalite_kernels.native.cuda.kernels import rows
from megalite_kernels.native.cuda.kernels.rows import Rows
from tests.helpers.margins import surrounded, surrounded_outputs
from tests.ops.catalogue import check, random
from tests.ops.test_norms import plain_layer, plain_rms
from tests.ops.test_registration import CALLS, WEIGHT, X

ROWS = 37
"""With two blocks of 8 rows or of 1 at a time: several turns, the last one ragged."""
LAYOUTS = {"warp": Rows(8, 8, 64), "block": Rows(64, 8, 64)}
CASES = [
    ("warp", 64, torch.bfloat16),  # 8 rows a block, 16-byte accesses
    ("warp", 17, torch.float32),  # a row of 8 lanes that ends inside them, element by element
    ("block", 200, torch.float32),
    ("block", 333, torch.bfloat16),
    ("long", 1040, torch.float16),  # two turns and a rest
    ("long", 1031, torch.float32),
]


@contextmanager
def layout(path: str) -> Iterator[None]:
    """Launch with small blocks: "warp" has several rows a block, "block" a row, "long" a part of one."""
    table = () if path == "long" else (LAYOUTS[path],)
    with (
        mock.patch.multiple(
            rows,
            FORWARD=table,
            FORWARD_SINGLE=table,
            BACKWARD=table,
            BACKWARD_WIDE=table,
            BACKWARD_SINGLE=table,
            FORWARD_LONG=LAYOUTS["block"],
            BACKWARD_LONG=LAYOUTS["block"],
            MEANS_LONG=LAYOUTS["block"],
        ),
        mock.patch.multiple(launchers, THREADS_OF_BACKWARD=64, multiprocessors=lambda device: 2),
    ):
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


@pytest.mark.parametrize(("path", "size", "dtype"), CASES)
class TestAccuracy:
    def test_rms_norm(self, path: str, size: int, dtype: torch.dtype) -> None:
        with layout(path):
            inputs = [random(ROWS, size), random(size, seed=1)]
            check(mk.rms_norm, plain_rms, inputs, dtype=dtype, backend="cuda")

    def test_rms_norm_with_residual(self, path: str, size: int, dtype: torch.dtype) -> None:
        with layout(path):
            inputs = [random(ROWS, size), random(ROWS, size, seed=2), random(size, seed=1, scale=0.1)]
            check(rms_with_residual, plain_rms_with_residual, inputs, dtype=dtype, backend="cuda")

    def test_layer_norm(self, path: str, size: int, dtype: torch.dtype) -> None:
        with layout(path):
            inputs = [random(ROWS, size) + 3, random(size, seed=1), random(size, seed=2)]
            check(mk.layer_norm, plain_layer, inputs, dtype=dtype, backend="cuda", magnitude=1.0)

    def test_layer_norm_with_residual(self, path: str, size: int, dtype: torch.dtype) -> None:
        with layout(path):
            inputs = [random(ROWS, size, seed=s) for s in (0, 3)] + [random(size, seed=s) for s in (1, 2)]
            check(
                layer_with_residual,
                plain_layer_with_residual,
                inputs,
                dtype=dtype,
                backend="cuda",
                magnitude=1.0,
            )


@pytest.mark.parametrize(("ours", "plain"), [(mk.rms_norm, plain_rms), (mk.layer_norm, plain_layer)])
def test_as_launched_on_a_gpu(ours: Callable[..., Tensor], plain: Callable[..., Tensor]) -> None:
    """The tables' own entries, at a real size: a block of 256 threads a row."""
    check(ours, plain, [random(9, 4096), random(4096, seed=1)], dtype=torch.bfloat16, backend="cuda")


def test_one_column_and_no_bias() -> None:
    with layout("warp"):
        # magnitude: with one column dx is a difference of equal terms
        inputs = [random(3, 1), random(1)]
        check(mk.rms_norm, plain_rms, inputs, dtype=torch.float32, backend="cuda", magnitude=1.0)
        inputs = [random(9, 40), random(40, seed=1)]
        check(mk.layer_norm, plain_layer, inputs, dtype=torch.bfloat16, backend="cuda")


@pytest.mark.parametrize(("path", "size"), [("block", 200), ("long", 1031)])
def test_a_large_mean_costs_no_digits(path: str, size: int) -> None:
    inputs = [random(5, size) + 1000, random(size, seed=1), random(size, seed=2)]
    with layout(path):
        check(mk.layer_norm, plain_layer, inputs, dtype=torch.float32, backend="cuda")
        inputs[0][:, :64] = 0  # the first turn says nothing about the rest
        check(mk.layer_norm, plain_layer, inputs, dtype=torch.float32, backend="cuda")


@pytest.mark.parametrize(("path", "size"), [("block", 200), ("long", 1031)])
@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_extreme_scales(scale: float, path: str, size: int) -> None:
    inputs = [random(4, size, scale=scale), random(size, seed=1)]
    with layout(path):
        check(mk.rms_norm, plain_rms, inputs, dtype=torch.float32, backend="cuda", floor=4)


@pytest.mark.parametrize(("path", "size"), [("warp", 17), ("block", 200), ("long", 1031)])
@pytest.mark.parametrize("norm", [mk.rms_norm, mk.layer_norm])
def test_nan_stays_in_its_row(norm: Callable[..., Tensor], path: str, size: int) -> None:
    x = random(5, size)
    x[1, 5] = torch.nan
    x.requires_grad_()
    with layout(path), mk.use_backend("cuda"):
        y = norm(x, torch.ones(size))
        (dx,) = torch.autograd.grad(y.sum(), x)
    rows_there = torch.tensor([True, False, True, True, True])
    for result in (y, dx):
        assert torch.equal(torch.isfinite(result).all(1), rows_there)
        assert torch.equal(torch.isfinite(result).any(1), rows_there)


@pytest.mark.parametrize(("path", "size"), [("warp", 64), ("block", 333)])
def test_same_bits_again_and_for_a_row_alone(path: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order blocks, warps and lanes run."""
    x, weight = random(ROWS, size).bfloat16().requires_grad_(), random(size, seed=1).bfloat16()
    weight.requires_grad_()

    def run(x: Tensor, seed: int) -> tuple[Tensor, ...]:
        monkeypatch.setenv("MEGALITE_CUDA_EMULATE_SEED", str(seed))
        with layout(path), mk.use_backend("cuda"):
            y = mk.layer_norm(x, weight)
            return y, *torch.autograd.grad(y.float().square().sum(), [x, weight])

    first, second = run(x, 1), run(x, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = run(x[7:8], 3)
    assert torch.equal(first[0][7:8], alone[0])
    assert torch.equal(first[1][7:8], alone[1])


@pytest.mark.parametrize(("path", "size", "dtype"), [CASES[0], CASES[1], CASES[3], CASES[5]])
def test_nothing_outside_of_the_tensors_is_read_or_written(path: str, size: int, dtype: torch.dtype) -> None:
    x, weight = (surrounded(t.to(dtype)) for t in (random(ROWS, size), random(size)))
    rstd, ops = surrounded(torch.ones(ROWS)), torch.ops.megalite
    with layout(path), mk.use_backend("cuda"), surrounded_outputs():
        results = [
            *ops.rms_norm_residual_fwd(x, x, weight, 1e-6, False),
            *ops.rms_norm_bwd(x, None, x, weight, rstd, False),
            *ops.layer_norm_residual_fwd(x, x, weight, weight, 1e-5),
            *ops.layer_norm_bwd(x, x, x, weight, rstd, rstd),
        ]
    assert all(bool(torch.isfinite(result).all()) for result in results)


@pytest.mark.parametrize(("path", "size", "dtype"), [CASES[1], CASES[2], CASES[5]])
def test_statistics_are_the_reference_s(path: str, size: int, dtype: torch.dtype) -> None:
    x, weight, bias = random(3, 4, size), random(size, seed=1), random(size, seed=2)
    for op, args in (
        ("rms_norm_fwd", (x, weight, 1e-6, True)),
        ("rms_norm_residual_fwd", (x, x, weight, 1e-6, False)),
        ("layer_norm_fwd", (x, weight, bias, 1e-5)),
        ("layer_norm_residual_fwd", (x, x, weight, None, 1e-5)),
    ):
        with layout(path), mk.use_backend("cuda"):
            ours = getattr(torch.ops.megalite, op)(*args)
        with mk.use_backend("reference"):
            theirs = getattr(torch.ops.megalite, op)(*args)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("weight_dtype", "read_as"), [(torch.float32, "float"), (torch.float16, "float")])
def test_weights_of_another_dtype(weight_dtype: torch.dtype, read_as: str) -> None:
    x, weight = (
        random(5, 32).bfloat16().requires_grad_(),
        random(32, seed=1).to(weight_dtype).requires_grad_(),
    )
    with layout("warp"), mk.use_backend("cuda"):
        assert launchers.readable(weight, x).dtype == getattr(torch, read_as)  # type: ignore[union-attr]
        y = mk.rms_norm(x, weight)
        dx, dweight = torch.autograd.grad(y, [x, weight], torch.ones_like(y))
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, weight_dtype)
    wide, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    truth = plain_rms(wide, wide_weight)
    true_dx, true_dweight = torch.autograd.grad(truth.sum(), [wide, wide_weight])
    torch.testing.assert_close(y.double(), truth, rtol=2**-8, atol=1e-6)  # one rounding to bf16
    torch.testing.assert_close(dx.double(), true_dx, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(dweight.double(), true_dweight, rtol=2**-10, atol=1e-5)


def test_rows_that_start_between_16_bytes() -> None:
    """A contiguous slice of a bigger tensor: its rows are of whole vectors, its address is not."""
    x, weight = random(8 * 64 + 1).bfloat16()[1:].view(8, 64), random(64, seed=1).bfloat16()
    assert not launchers.aligned(64, x, weight)
    assert launchers.aligned(64, x.clone(), weight)
    with layout("warp"), mk.use_backend("cuda"):
        ours = mk.rms_norm(x, weight)
        aligned = mk.rms_norm(x.clone(), weight)
    torch.testing.assert_close(ours, aligned)


def test_non_contiguous_and_empty() -> None:
    with layout("warp"):
        check(
            lambda x, w: mk.rms_norm(x.transpose(0, 1), w),
            lambda x, w: plain_rms(x.transpose(0, 1), w),
            [random(3, 4, 32), random(32, seed=1)],
            dtype=torch.bfloat16,
            backend="cuda",
        )
    x, weight = torch.empty(0, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    with mk.use_backend("cuda"):
        for norm in (mk.rms_norm, mk.layer_norm):
            dx, dweight = torch.autograd.grad(norm(x, weight).sum(), [x, weight])
            assert dx.shape == (0, 16)
            assert torch.equal(dweight, torch.zeros(16))
        assert torch.isnan(
            torch.ops.megalite.rms_norm_fwd(x.new_empty(2, 0), x.new_empty(0), 1e-6, False)[1]
        ).all()


@pytest.mark.parametrize(
    "op", [f"{norm}_{part}" for norm in ("rms_norm", "layer_norm") for part in ("fwd", "residual_fwd", "bwd")]
)
def test_opcheck(op: str) -> None:
    """Schema, writes, strides and dtypes are those of the other back-ends."""
    shapes = (X.shape, WEIGHT.shape)
    args = [arg.bfloat16() if isinstance(arg, Tensor) and arg.shape in shapes else arg for arg in CALLS[op]]
    with layout("warp"), mk.use_backend("cuda"):
        call = getattr(torch.ops.megalite, op).default
        torch.library.opcheck(call, tuple(args), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_every_input_is_read_once(op: str) -> None:
    """The bytes that the kernels' heads state; the weight, the statistics and the partial sums come on top."""
    x, weight, rstd, ops = random(ROWS, 200), random(200), torch.ones(ROWS), torch.ops.megalite
    size, extra = x.numel() * 4, ([None] if op == "layer_norm" else [])
    last = [1e-5] if op == "layer_norm" else [1e-6, False]
    with layout("block"), mk.use_backend("cuda"), reporting() as reports:
        getattr(ops, f"{op}_fwd")(x, weight, *extra, *last)
        getattr(ops, f"{op}_residual_fwd")(x, x, weight, *extra, *last)
        if op == "layer_norm":
            ops.layer_norm_bwd(x, x, x, weight, rstd, rstd)
        else:
            ops.rms_norm_bwd(x, x, x, weight, rstd, False)
    forward, residual, backward, _ = reports
    statistics = 1 if op == "rms_norm" else 2
    assert forward.global_read_bytes == size + ROWS * 200 * 4
    assert forward.global_written_bytes == size + 4 * statistics * ROWS
    assert residual.global_read_bytes == 2 * size + ROWS * 200 * 4
    assert residual.global_written_bytes == 2 * size + 4 * statistics * ROWS
    weights = 2 * 200 * 4 if op == "rms_norm" else ROWS * 200 * 4
    assert backward.global_read_bytes == 3 * size + weights + ROWS * 64 * 4 * statistics
    assert backward.global_written_bytes == size + 2 * 200 * 4 * statistics
    assert not any(report.bank_conflicts for report in reports)


@pytest.mark.parametrize("hidden", [1, 48, 65, 1000, 4096, 5120, 8192, 12288, 16384, 65536])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("element", "weight"), [("bf16", "bf16"), ("fp16", "float"), ("float", "float")])
def test_every_length_has_a_layout(hidden: int, aligned: bool, element: str, weight: str) -> None:
    for kernels in (rms_kernels, layer_kernels):
        forward, lies = kernels.forward_kernel(element, weight, hidden=hidden, aligned=aligned)
        backward, backward_lies, means = kernels.backward_kernels(
            element, weight, hidden=hidden, aligned=aligned
        )
        assert forward.name.endswith("_long") == (lies.columns < hidden)
        assert (lies.columns < hidden) == (hidden > (16384 if aligned else 8192))
        assert (means is None) == (backward_lies.columns >= hidden)
        assert means is None or hidden > (8192 if aligned else 4096)
        for one in (lies, backward_lies):
            assert one.lanes <= 32 or one.lanes == one.threads
            assert one.threads % 32 == 0
            assert one.items % 8 == 0
        assert backward.shared_bytes <= 48 << 10
