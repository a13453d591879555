"""linear with an fp32 accumulator for the weight's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.ops.linear import project, project_back
from megalite_kernels.testing import assert_as_accurate
from tests.ops.catalogue import BACKENDS, DTYPES, cpu_only, generator, needs_native, random


def test_without_accumulator_it_is_torchs() -> None:
    x, weight, bias = random(2, 5, 8), random(3, 8, seed=1), random(3, seed=2)
    assert torch.equal(mk.linear(x, weight, bias=bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "out"), [((2, 5, 8), 3), ((7,), 13), ((0, 8), 4), ((3, 101, 330), 401)], ids=str
)
def test_gradients_are_as_accurate_as_torchs(
    shape: tuple[int, ...], out: int, dtype: torch.dtype, backend: str
) -> None:
    """The last shape is one whose products are the native library's; dy is a part of wider rows."""
    sizes = [shape, (out, shape[-1]), (out,)]
    leaves = [random(*size, seed=i).to(dtype).requires_grad_() for i, size in enumerate(sizes)]
    dy = random(*shape[:-1], out + 5, seed=3).to(dtype)[..., 5:]

    def results(function: Any, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
        y = function(leaves[0], leaves[1], bias=leaves[2])
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    plain = results(F.linear, leaves, dy)
    truth = results(F.linear, [t.detach().double().requires_grad_() for t in leaves], dy.double())
    with mk.use_backend(backend):
        got = results(mk.linear, leaves, dy)
    for name, *three in zip(("y", "dx", "dweight", "dbias"), got, plain, truth, strict=True):
        assert_as_accurate(*three, floor=4, name=name)  # one chain of float sums


@cpu_only
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_the_wanted_gradients_need_is_computed_and_kept(wanted: tuple[bool, ...]) -> None:
    leaves = [random(*s, seed=i) for i, s in enumerate([(5, 8), (3, 8), (3,)])]
    for leaf, want in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(want)
    x, weight, bias = leaves
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = mk.linear(x, weight, bias=bias)
    with mk.backend.recording() as ran:
        y.sum().backward()
    expected = {0: ("linear_dgrad", weight.shape), 1: ("linear_weight_grad", x.shape), 2: (None, None)}
    op, shape = expected[wanted.index(True)]
    assert [choice.op for choice in ran] == [op] * (op is not None)
    assert kept == [shape] * (op is not None)


@cpu_only
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_not_kept_may_be_written(frozen: str) -> None:
    """As with torch's own: a layer behind frozen weights writes over its input, or a weight is changed early."""
    x, weight = random(5, 8), random(3, 8, seed=1)
    (weight if frozen == "x" else x).requires_grad_()
    given = x if frozen == "x" else x * 1
    y = mk.linear(given, weight)
    with torch.no_grad():
        (weight if frozen == "x" else given).zero_()
    y.sum().backward()


@cpu_only
def test_a_second_derivative_is_refused() -> None:
    x, weight = random(5, 8).requires_grad_(), random(3, 8, seed=1).requires_grad_()
    (dx,) = torch.autograd.grad(mk.linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@cpu_only
def test_under_autocast_it_is_torchs_which_casts_a_weight_once() -> None:
    x, weight, bias = (random(*s, seed=i).requires_grad_() for i, s in enumerate([(5, 8), (3, 8), (3,)]))
    with mk.backend.recording() as ran, torch.autocast("cpu", torch.bfloat16):
        ours, theirs = mk.linear(x.bfloat16(), weight, bias=bias), F.linear(x, weight, bias)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)
    assert not ran


@cpu_only
@pytest.mark.parametrize("size", [8, 384])
def test_with_an_accumulator_the_dtype_is_the_inputs_under_autocast_too(size: int) -> None:
    """Whoever makes the product: the smaller one is torch's, the larger the native library's where that is faster."""
    x, weight, main_grad = (
        random(size, size).requires_grad_(),
        random(size, size, seed=1),
        torch.zeros(size, size),
    )
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = mk.linear(x, weight, main_grad=main_grad)
        y.sum().backward()
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x @ weight.t(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(size, size), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(main_grad, x.sum(0).expand(size, size), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(("features", "out"), [(0, 5), (5, 0), (0, 0), (4, 5)])
def test_no_features_and_no_data(features: int, out: int, device: str) -> None:
    x = torch.ones(2, 3, features, device=device, requires_grad=True)
    weight = torch.ones(out, features, device=device, requires_grad=True)
    accumulator = torch.ones(out, features, device=device)
    for main_grad in (None, accumulator):
        y = mk.linear(x, weight, main_grad=main_grad)
        assert y.shape == (2, 3, out)
        gradients = torch.autograd.grad(y.sum(), (x, weight) if main_grad is None else (x,))
        assert [g.shape for g in gradients] == [x.shape, weight.shape][: len(gradients)]
        if device == "cpu" and features == 0 < out:
            assert not y.any()


@cpu_only
def test_sharded_tensors_stay_torchs(rank_pool: Any) -> None:
    rank_pool(2).run(sharded_job)


def sharded_job() -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    x, weight = random(5, 8), random(4, 8, seed=1)
    split = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    y = mk.linear(distribute_tensor(x, mesh, [Replicate()]), split)
    assert isinstance(y, DTensor)
    torch.testing.assert_close(y.full_tensor(), F.linear(x, weight))
    y.sum().backward()
    assert isinstance(split.grad, DTensor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_added_into_the_accumulator(dtype: torch.dtype, backend: str) -> None:
    x, weight, bias = (random(*s, seed=i).to(dtype) for i, s in enumerate([(2, 5, 8), (3, 8), (3,)]))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(F.linear(*leaves).square().sum(), leaves)
    main_grad = torch.full((3, 8), 2.0)
    with mk.use_backend(backend):
        for _ in range(2):
            mk.linear(x, weight, bias=bias, main_grad=main_grad).square().sum().backward()
    assert weight.grad is None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * expected[0])
    rounding = 2 * max(torch.finfo(dtype).eps, 1e-6)  # of torch's gradient; ours is never rounded to dtype
    torch.testing.assert_close(main_grad, 2 + 2 * expected[1].float(), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 37])
def test_weight_gradient_overwrites(tokens: int, dtype: torch.dtype, backend: str) -> None:
    dy, x = random(tokens, 40).to(dtype), random(tokens, 24).to(dtype)
    expected, got = torch.zeros(40, 24), torch.full((40, 24), torch.nan)
    with mk.use_backend(backend):
        torch.ops.megalite.linear_weight_grad_(dy, x, expected)
        torch.ops.megalite.linear_weight_grad_(dy, x, got, False)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "out", "features"), [(1, 1, 1), (7, 13, 5), (64, 64, 64), (2055, 30, 49), (33, 530, 100)]
)
def test_weight_gradient_accuracy(
    tokens: int, out: int, features: int, dtype: torch.dtype, backend: str
) -> None:
    """Against torch's float32 product of the same inputs; the last two cross the kernel's blocks."""
    dy, x = random(tokens, out).to(dtype), random(tokens, features, seed=1).to(dtype)
    main_grad = random(out, features, seed=2)
    truth = main_grad.double() + dy.double().t() @ x.double()
    plain = main_grad + dy.float().t() @ x.float()
    if backend == "reference" and dtype != torch.float32:  # torch's product is rounded to dtype there
        plain = main_grad + torch.mm(dy.t(), x).float()
    with mk.use_backend(backend):
        torch.ops.megalite.linear_weight_grad_(dy, x, main_grad)
    assert_as_accurate(main_grad, plain, truth, floor=8)  # float sums of 2,048 terms in one chain


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_gradient_of_strided_and_empty_inputs(dtype: torch.dtype, backend: str) -> None:
    dy, x = random(9, 40).to(dtype)[:, 3:30], random(50, 9, seed=1).to(dtype).t()
    got, expected = torch.zeros(27, 50), torch.zeros(27, 50)
    with mk.use_backend(backend):
        torch.ops.megalite.linear_weight_grad_(dy, x, got)
        torch.ops.megalite.linear_weight_grad_(dy.contiguous(), x.contiguous(), expected)
        torch.ops.megalite.linear_weight_grad_(dy[:0], x[:0], expected)
    assert torch.equal(got, expected)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("out", "features"), [(704, 416), (701, 423)])
def test_large_weight_gradients(out: int, features: int, add: bool, dtype: torch.dtype) -> None:
    """More than 1 MB of sums over more of the inner dimension, and more rows, than the near caches take at once."""
    dy, x = random(1100, out).to(dtype), random(1100, features, seed=1).to(dtype)
    main_grad = random(out, features, seed=2)
    plain, truth = dy.float().t() @ x.float(), dy.double().t() @ x.double()
    if add:
        plain, truth = plain + main_grad, truth + main_grad.double()
    with mk.use_backend("cpu"):
        torch.ops.megalite.linear_weight_grad_(dy, x, main_grad, add)
    assert_as_accurate(main_grad, plain, truth, floor=8)  # float sums of 1,100 terms in one chain


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row_and_column(dtype: torch.dtype) -> None:
    dy, x, main_grad = random(20, 30).to(dtype), random(20, 60, seed=1).to(dtype), torch.zeros(30, 60)
    dy[3, 7] = torch.nan
    x[5, 50] = torch.inf
    with mk.use_backend("cpu"):
        torch.ops.megalite.linear_weight_grad_(dy, x, main_grad)
    bad = ~torch.isfinite(main_grad)
    bad[7] = bad[:, 50] = False
    assert not bad.any()
    assert torch.isnan(main_grad[7]).all()
    assert not torch.isfinite(main_grad[:, 50]).any()


def sides(rows: int, cols: int, inner: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Factors [rows, inner] and [inner, cols] in the memory layouts of forward, dgrad and wgrad, and as views."""
    left, right = random(rows, inner).to(dtype), random(inner, cols, seed=1).to(dtype)
    left_t, right_t = left.t().contiguous().t(), right.t().contiguous().t()
    views = random(rows, inner + 3).to(dtype)[:, 3:], random(2 * inner, cols, seed=1).to(dtype)[::2]
    return [(left, right_t), (left, right), (left_t, right), views]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "cols", "inner"),
    [
        (1, 1, 1),
        (1, 70, 31),
        (7, 13, 5),
        (13, 130, 64),
        (50, 67, 3100),
        (101, 16, 33),
        (40, 1400, 3100),
        (600, 40, 3100),
    ],
)
def test_products_are_as_accurate_as_torchs(rows: int, cols: int, inner: int, dtype: torch.dtype) -> None:
    """Ragged tiles, odd inner sizes (half a pair), and more inner words than one block holds."""
    from megalite_kernels.native.linear import multiply_

    bias = random(cols, seed=2).to(dtype)
    for left, right in sides(rows, cols, inner, dtype):
        out = torch.full((rows, cols + 1), 7.0, dtype=dtype)
        multiply_(out[:, :cols], left, right, bias=bias)
        truth = bias.double() + left.double() @ right.double()
        plain = torch.addmm(bias, left, right)
        assert_as_accurate(out[:, :cols], plain, truth, floor=4)  # one chain of float sums
        assert (out[:, cols] == 7).all()  # nothing beyond the row's end


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1024, 1031])
def test_large_products_are_as_accurate_as_torchs(rows: int, dtype: torch.dtype) -> None:
    """Results of more than 1 MB whose rows are whole cache lines; left factors that are read where they stand."""
    from megalite_kernels.native.linear import multiply_

    cols, inner = 544, 64
    bias = random(cols, seed=2).to(dtype)
    for left, right in sides(rows, cols, inner, dtype):
        out = torch.full((rows, cols), 7.0, dtype=dtype)
        multiply_(out, left, right, bias=bias)
        truth = bias.double() + left.double() @ right.double()
        assert_as_accurate(out, torch.addmm(bias, left, right), truth, floor=4)  # one chain of float sums


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_have_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    from megalite_kernels.native.linear import multiply_

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append([])
            for left, right in sides(190, 260, 150, dtype):
                out = torch.empty(190, 260, dtype=dtype)
                multiply_(out, left, right)
                found[-1].append(out)
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bad_numbers_stay_in_their_row_and_column_of_a_product(dtype: torch.dtype) -> None:
    from megalite_kernels.native.linear import multiply_

    for left, right in sides(20, 70, 31, dtype):
        left[3, 30], right[5, 68] = torch.nan, torch.inf
        out = torch.empty(20, 70, dtype=dtype)
        multiply_(out, left, right)
        bad = ~torch.isfinite(out)
        assert bad[3].all()
        assert bad[:, 68].all()
        bad[3] = bad[:, 68] = False
        assert not bad.any()


@needs_native
@pytest.mark.parametrize("rows", [32, 45])
def test_accuracy_on_cpu_of_a_float_times_one_is_every_bit(rows: int) -> None:
    """No bit of a significand is lost, of the largest floats either, on either side of a product."""
    from megalite_kernels.native.linear import multiply_

    bits = torch.randint(-(2**31), 2**31, (rows, 150), dtype=torch.int64, generator=generator()).int()
    values = bits.view(torch.float32)
    # Far below, the last of three bf16, or its product, would be no normal number.
    values = torch.where(values.isfinite() & (values.abs() > 2.0**-80), values, 1 + 2.0**-23)
    values[0, :2] = torch.tensor([torch.finfo(torch.float32).max, torch.finfo(torch.float32).min])
    for one in (1.0, -(2.0**-9)):
        expected = values * one
        for left, right in (
            (values, one * torch.eye(150)),
            (values.t().contiguous().t(), one * torch.eye(150)),
        ):
            out = torch.empty(rows, 150)
            multiply_(out, left, right)
            assert torch.equal(out, expected)
            out = torch.empty(150, rows)
            multiply_(out, right, left.t())
            assert torch.equal(out, expected.t())


@needs_native
@pytest.mark.parametrize("inner", [512, 8192])
def test_accuracy_on_cpu_of_sums_of_one_sign(inner: int) -> None:
    """What is left out of each product, and each rounding of a long sum, would add up here."""
    from megalite_kernels.native.linear import multiply_

    left, right = random(32, inner).abs(), random(inner, 48, seed=1).abs()
    out = torch.empty(32, 48)
    multiply_(out, left, right)
    assert_as_accurate(out, left @ right, left.double() @ right.double(), floor=4)  # one chain


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_products_of_a_layer(dtype: torch.dtype) -> None:
    """Of a size that the native library takes where it is faster, with a batch dim and strided rows."""
    x, weight, bias = (
        random(*s, seed=i).to(dtype) for i, s in enumerate([(2, 160, 400), (300, 400), (300,)])
    )
    dy = random(2, 160, 310, seed=3).to(dtype)[..., :300]
    y, dx = project(x, weight, bias), project_back(dy, weight)
    truth = F.linear(x.double(), weight.double(), bias.double())
    assert_as_accurate(y, F.linear(x, weight, bias), truth, floor=4)
    assert_as_accurate(dx, dy @ weight, dy.double() @ weight.double(), floor=4)


def layouts(rows: int, cols: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """A matrix whole, transposed, as columns of a wider one, and with no two elements side by side."""
    t = random(rows, cols, seed=seed).to(dtype)
    wide = random(2 * rows, 2 * cols, seed=seed + 1).to(dtype)
    return [t, t.t().contiguous().t(), wide[:rows, 3 : cols + 3], wide[::2, ::2]]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "features"), [(96, 96), (48, 80)])
def test_a_layers_products_of_inputs_and_weights_in_any_layout(
    out: int, features: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are given to the native library as they lie; a square weight does not say which side is which."""
    from megalite_kernels.native import linear

    monkeypatch.setattr(linear, "wins", lambda *sizes: True)
    bias = random(2 * out, seed=9).to(dtype)[::2]
    for weight in layouts(out, features, dtype, 1):
        for x, dy in zip(layouts(60, features, dtype, 3), layouts(60, out, dtype, 5), strict=True):
            for given in (x, x.unflatten(0, (4, 15))):
                truth = F.linear(given.double(), weight.double(), bias.double())
                got = linear.forward(given, weight, bias)
                assert_as_accurate(got, F.linear(given, weight, bias), truth, floor=4)
            for given in (dy, dy.unflatten(0, (4, 15))):
                truth = given.double() @ weight.double()
                assert_as_accurate(linear.dgrad(given, weight), given @ weight, truth, floor=4)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,), (3, 0)])
def test_empty_and_single_rows(shape: tuple[int, ...]) -> None:
    x, weight = random(*shape), random(4, shape[-1], seed=1)
    assert torch.equal(project(x, weight), F.linear(x, weight))


def test_a_frozen_weight_is_left_alone() -> None:
    x, main_grad = random(5, 8).requires_grad_(), torch.zeros(3, 8)
    mk.linear(x, random(3, 8), main_grad=main_grad).sum().backward()
    assert x.grad is not None
    assert torch.equal(main_grad, torch.zeros(3, 8))


def test_errors_name_value_and_limit() -> None:
    x, weight = random(5, 8), random(3, 8)
    with pytest.raises(ValueError, match=r"main_grad has shape \[8, 3\], but weight needs \[3, 8\]"):
        mk.linear(x, weight, main_grad=torch.zeros(8, 3))
    with pytest.raises(ValueError, match=r"main_grad has dtype torch.float16: pass an fp32 accumulator"):
        mk.linear(x, weight, main_grad=torch.zeros(3, 8).half())
    with pytest.raises(ValueError, match=r"weight has shape \[3, 7\], but x with 8 features needs \[3, 8\]"):
        mk.linear(x, weight[:, :7])
    with pytest.raises(ValueError, match=r"weight is torch.bfloat16 but x is torch.float32"):
        mk.linear(x, weight.bfloat16())
