"""The rotary kernels, emulated: blocks of one warp, so that heads take several turns and end ragged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.native.cuda import rope as launchers
from megalite_kernels.native.cuda.emulated import reporting
from megalite_kernels.native.cuda.kernels import rope as kernels
from tests.helpers.margins import surrounded, surrounded_outputs
from tests.ops import test_rope as ops
from tests.ops.catalogue import check, random

SHAPES = [
    (26, 13, True, torch.bfloat16),  # feature by feature
    (40, 12, True, torch.float32),  # 16 bytes at a time, 3 + 2 units of 8 lanes: 4 heads in a turn
    (48, 16, False, torch.float16),  # 2 + 1 units
    (64, 32, False, torch.bfloat16),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warp a block, and five blocks in the backward."""
    monkeypatch.setattr(kernels, "THREADS", 32)
    monkeypatch.setattr(launchers, "BLOCKS_OF_BACKWARD", 1)
    monkeypatch.setattr(launchers, "multiprocessors", lambda device: 5)


@pytest.mark.parametrize(("dim", "half", "interleaved", "dtype"), SHAPES)
def test_accuracy(dim: int, half: int, interleaved: bool, dtype: torch.dtype) -> None:
    ops.test_accuracy(dim, half, interleaved, dtype, "cuda")


@pytest.mark.parametrize(("dim", "half", "interleaved", "dtype"), SHAPES)
def test_norm_accuracy(dim: int, half: int, interleaved: bool, dtype: torch.dtype) -> None:
    ops.test_norm_accuracy(dim, half, interleaved, dtype, "cuda")


@pytest.mark.parametrize(("dim", "half", "dtype"), [(40, 12, torch.float32), (98, 45, torch.bfloat16)])
def test_many_heads_and_several_units_a_lane(dim: int, half: int, dtype: torch.dtype) -> None:
    """More heads than a block has slots for; 49 units on 32 lanes."""
    angle = ops.angles(7, half)
    cos, sin = angle.double().cos().float(), angle.double().sin().float()

    def ours(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor) -> tuple[Tensor, ...]:
        normed = mk.rope(q, k, cos, sin, q_norm=wq, k_norm=wk, interleaved=True)
        return *normed, *mk.rope(q, k, cos, sin, interleaved=True)

    def plain(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor) -> tuple[Tensor, ...]:
        normed = (torch.nn.functional.rms_norm(x, (dim,), w, 1e-6) for x, w in ((q, wq), (k, wk)))
        return tuple(ops.plain(x, angle, True) for x in (*normed, q, k))

    inputs = [random(7, 9, dim), random(7, 5, dim, seed=1), random(dim, seed=2), random(dim, seed=3)]
    check(ours, plain, inputs, dtype=dtype, backend="cuda", floor=2)


def test_as_launched_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of 128 threads, 16 heads of 128 in a turn."""
    monkeypatch.setattr(kernels, "THREADS", 128)
    ops.test_norm_accuracy(128, 64, False, torch.bfloat16, "cuda")


def test_views_and_tables() -> None:
    ops.test_views_of_a_fused_projection_give_the_same_bits("cuda")
    ops.test_transposed_heads_and_batched_tables("cuda")
    ops.test_norm_of_views_and_of_weights_in_another_dtype("cuda")


def test_extremes_nan_and_empty() -> None:
    ops.test_norm_extremes_and_nan("cuda")
    ops.test_empty("cuda")
    q, table, weight = torch.empty(0, 4, 8), torch.empty(0, 4), torch.ones(8)
    with mk.use_backend("cuda"):
        grads = torch.ops.megalite.rope_norm_bwd(
            q, q, q, q, weight, weight, q.new_empty(0), q.new_empty(0), table, table, False
        )
    assert [g.shape for g in grads] == [q.shape, q.shape, weight.shape, weight.shape]
    assert not grads[2].any()


@pytest.mark.parametrize(("interleaved", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_in_place(dtype: torch.dtype, interleaved: bool) -> None:
    ops.test_in_place_gives_the_bits_of_out_of_place(dtype, interleaved, "cuda")


def test_in_place_gradients() -> None:
    ops.test_in_place_gradients("cuda")


def test_a_nan_or_infinity_stays_where_it_belongs() -> None:
    """In its pair, or with the norm in its head; features that pass through keep their bits."""
    q, k, angle = random(3, 3, 16), random(3, 3, 16, seed=1), ops.angles(3, 4)
    q[1, 2, 0] = torch.nan
    k[0, 0, 8:] = torch.tensor([torch.inf, -0.0, 1.0, -torch.inf, 5.0, -0.0, 0.0, torch.nan])
    weight = torch.ones(16)
    with mk.use_backend("cuda"):
        plain = mk.rope(q, k, angle.cos(), angle.sin())
        normed = mk.rope(q, k, angle.cos(), angle.sin(), q_norm=weight, k_norm=weight)
    assert torch.isnan(plain[0]).nonzero().tolist() == [[1, 2, 0], [1, 2, 4]]
    assert torch.equal(plain[1][0, 0, 8:].view(torch.int32), k[0, 0, 8:].view(torch.int32))
    assert torch.isnan(normed[0]).any(-1).nonzero().tolist() == [[1, 2]]
    assert torch.isnan(normed[1]).any(-1).nonzero().tolist() == [[0, 0]]


def test_an_infinity_that_passes_through_spoils_no_neighbour() -> None:
    q, angle, weight = random(1, 1, 16), ops.angles(1, 4), torch.ones(16)
    q[0, 0, 12] = torch.inf  # rstd is 0
    with mk.use_backend("cuda"):
        normed = mk.rope(q, q, angle.cos(), angle.sin(), q_norm=weight, k_norm=weight)[0]
    assert torch.isnan(normed).nonzero().tolist() == [[0, 0, 12]]


def test_residuals_are_the_references() -> None:
    q, k, angle = random(5, 3, 8).bfloat16(), random(5, 1, 8, seed=1).bfloat16(), ops.angles(5, 3)
    weight = random(8, seed=2)
    call = torch.ops.megalite.rope_norm_fwd
    with mk.use_backend("cuda"):
        ours = call(q, k, weight, weight, angle.cos(), angle.sin(), 1e-5, True)
    with mk.use_backend("reference"):
        theirs = call(q, k, weight, weight, angle.cos(), angle.sin(), 1e-5, True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    torch.testing.assert_close(ours[2:], theirs[2:])


@pytest.mark.parametrize("op", ["rope_fwd", "rope_"])
def test_opcheck(op: str) -> None:
    q, k, angle = random(3, 3, 16), random(3, 2, 16, seed=1), ops.angles(3, 4)
    with mk.use_backend("cuda"):
        call, args = getattr(torch.ops.megalite, op).default, (q, k, angle.cos(), angle.sin(), False, False)
        torch.library.opcheck(call, args, test_utils=("test_schema", "test_faketensor"))


def test_the_sums_do_not_depend_on_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def grads(seed: str) -> tuple[Tensor, ...]:
        monkeypatch.setenv("MEGALITE_CUDA_EMULATE_SEED", seed)
        x, weight = random(9, 3, 40).requires_grad_(), random(40, seed=1).requires_grad_()
        angle = ops.angles(9, 12)
        cos, sin = angle.cos(), angle.sin()
        out = mk.rope(x, x * 2, cos, sin, q_norm=weight, k_norm=weight * 2, interleaved=True)
        return torch.autograd.grad(out, [x, weight], [random(9, 3, 40, seed=2)] * 2)

    with mk.use_backend("cuda"):
        assert all(torch.equal(a, b) for a, b in zip(grads("1"), grads("2"), strict=True))


@pytest.mark.parametrize("half", [12, 13])
def test_nothing_outside_of_the_tensors_is_read_or_written(half: int) -> None:
    q, k, weight = surrounded(random(5, 9, 40)), surrounded(random(5, 5, 40)), surrounded(random(40))
    angle, rstd = ops.angles(5, half), [torch.ones(5 * heads) for heads in (9, 5)]
    cos, sin = surrounded(angle.cos()), surrounded(angle.sin())
    call = torch.ops.megalite
    with mk.use_backend("cuda"), surrounded_outputs():
        results = [
            *call.rope_fwd(q, k, cos, sin, True, True),
            *call.rope_norm_fwd(q, k, weight, weight, cos, sin, 1e-6, True),
            *call.rope_norm_bwd(q, k, q, k, weight, weight, *rstd, cos, sin, True),
        ]
    assert all(bool(torch.isfinite(result).all()) for result in results)


def test_everything_is_read_once_and_in_place_leaves_the_rest_alone() -> None:
    q, k, weight, angle = random(5, 9, 40), random(5, 5, 40), random(40), ops.angles(5, 12)
    cos, sin, rstd = angle.cos(), angle.sin(), [torch.ones(5 * heads) for heads in (9, 5)]
    size, call, slots = 4 * 5 * 14 * 40, torch.ops.megalite, 4
    angles_read = 5 * 2 * 12 * 4 * slots  # each slot of a block, so 4 of one token's
    with mk.use_backend("cuda"), reporting() as reports:
        call.rope_fwd(q, k, cos, sin, True, False)
        call.rope_(q.clone(), k.clone(), cos, sin, True, False)
        call.rope_norm_fwd(q, k, weight, weight, cos, sin, 1e-6, True)
        call.rope_norm_bwd(q, k, q, k, weight, weight, *rstd, cos, sin, True)
    forward, in_place, norm, backward, _ = reports
    weights, statistics = 2 * 5 * slots * 40 * 4, 5 * 14 * 4
    assert forward.global_read_bytes == size + angles_read
    assert forward.global_written_bytes == size
    assert in_place.global_read_bytes == size * 24 // 40 + angles_read
    assert in_place.global_written_bytes == size * 24 // 40
    assert norm.global_read_bytes == size + angles_read + weights
    assert norm.global_written_bytes == size + statistics
    assert backward.global_read_bytes == 2 * size + angles_read + weights + 8 * statistics  # by all 8 lanes
    assert backward.global_written_bytes == size + 5 * 2 * 40 * 4
    assert not any(report.bank_conflicts for report in reports)


def test_heads_too_large_are_refused() -> None:
    q, table = torch.empty(1, 1, 520), torch.empty(1, 8)
    with mk.use_backend("cuda"), pytest.raises(ValueError, match="takes heads up to 512 features, not 520"):
        mk.rope(q, q, table, table)


@pytest.mark.parametrize(("dim", "half"), [(2, 1), (64, 32), (80, 16), (128, 64), (256, 32), (512, 256)])
@pytest.mark.parametrize(("element", "aligned"), [("bf16", True), ("float", True), ("fp16", False)])
def test_every_head_has_its_lanes(dim: int, half: int, element: str, aligned: bool) -> None:
    kernel = kernels.rope_kernel(
        "rope_norm_backward", element, element, dim=dim, half=half, interleaved=False, aligned=aligned
    )
    sizes = {name: int(value) for name, value in kernel.defines if name in ("RUN", "UNITS", "LANES")}
    run, units, lanes = sizes["RUN"], sizes["UNITS"], sizes["LANES"]
    assert lanes * units >= -(-half // run) + -(-(dim - 2 * half) // (2 * run))
    assert 2 * run * units <= 16  # features a lane holds
    assert lanes in (1, 2, 4, 8, 16, 32)
