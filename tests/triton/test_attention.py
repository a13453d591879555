"""The Triton attention kernels: every option forwards and backwards, in blocks small enough to cross several."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch

import megalite_kernels as mk
from megalite_kernels.triton import attention as launchers
from megalite_kernels.triton.launch import Launch, override
from tests.helpers import attention as helpers
from tests.ops.catalogue import random

check = partial(helpers.check, "triton", dtype=torch.float32)
ours = partial(helpers.ours, "triton")


@pytest.fixture(params=[(16, 32), (32, 16)], ids=["16x32", "32x16"])
def blocks(request: pytest.FixtureRequest) -> Any:
    """All kernels with blocks of these sizes instead of 16x16."""
    rows, columns = request.param
    with ExitStack() as stack:
        for tables in (launchers.FORWARD, launchers.DK_DV, launchers.DQ):
            for table in tables.values():
                stack.enter_context(override(table.kernel, Launch({"BLOCK_M": rows, "BLOCK_N": columns})))
        yield


def descriptors() -> ExitStack:
    """The forward of Hopper and Blackwell instead of that of every GPU."""
    stack = ExitStack()
    for table in launchers.FORWARD_TMA.values():
        stack.enter_context(override(table.kernel, Launch({"BLOCK_M": 16, "BLOCK_N": 16, "SPECIALIZED": 1})))
    return stack


@pytest.fixture
def tma() -> Any:
    """`descriptors` during a test."""
    with descriptors():
        yield


@pytest.mark.parametrize(
    ("rows", "keys", "options"),
    [
        (37, 53, {}),
        (53, 37, {}),
        (37, 53, {"causal": False}),
        (53, 53, {"window": 9}),
        (49, 49, {"window": 9, "causal": False}),
        (40, 48, {"offset": 21}),
        (48, 40, {"offset": -19}),
        (48, 40, {"offset": -90}),
        (48, 48, {"offset": 13, "window": 20}),
        (48, 48, {"offset": -13, "window": 20, "causal": False}),
        (48, 48, {"softcap": 1.5, "scale": 0.7}),
        (33, 48, {"scale": -0.3}),
        (33, 48, {"scale": 0.0}),
    ],
    ids=str,
)
def test_options(rows: int, keys: int, options: dict[str, Any]) -> None:
    check((rows, keys, 3, 1, 16), options, from_lse="scale" in options)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 21}], ids=str)
def test_block_shapes(options: dict[str, Any], blocks: None) -> None:
    check((75, 70, 2, 1, 16), options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [32, 80, 96, 128])
def test_half_precision(dtype: torch.dtype, dim: int) -> None:
    check((33, 33, 3, 1, dim), dtype=dtype)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ((37, 53, 3, 1, 80), {}),
        ((37, 37, 3, 1, 128), {"window": 9, "causal": False}),
        ((20, 41, 2, 1, 72), {"offset": -9, "window": 18}),
        ((18, 18, 2, 2, 32), {"softcap": 1.5, "scale": -0.7}),
    ],
    ids=str,
)
def test_descriptors(shapes: tuple[Any, ...], options: dict[str, Any], tma: Any) -> None:
    check(shapes, options, dtype=torch.bfloat16, sinks="softcap" in options, batch=2)


def test_descriptors_are_not_for_every_layout(tma: Any) -> None:
    """Strides of no multiple of 16 bytes, and a batch whose entries don't follow one another, take pointers."""
    check((18, 18, 2, 1, 20), dtype=torch.bfloat16)
    q = random(18, 2, 2, 16).bfloat16().transpose(0, 1)
    with mk.use_backend("triton"):
        strided, copied = mk.attention(q, q, q), mk.attention(*[q.contiguous()] * 3)
    assert torch.equal(strided, copied)


@pytest.mark.parametrize("dim", [5, 20, 72, 256])
def test_head_dims(dim: int) -> None:
    check((20, 20, 2, 2, dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sinks(dtype: torch.dtype) -> None:
    check((35, 35, 3, 1, 16), {"window": 12}, dtype=dtype, sinks=True)
    check((20, 3, 2, 2, 16), dtype=dtype, sinks=True, batch=2)


@pytest.mark.parametrize(
    ("bounds", "options"),
    [
        ([[0, 16, 17, 17, 54, 70]], {}),
        ([[0, 16, 17, 17, 54, 70]], {"window": 7, "causal": False}),
        ([[0, 20, 20, 55, 60], [0, 0, 33, 63, 70]], {}),
        ([[0, 20, 20, 55, 60], [0, 8, 33, 63, 70]], {"offset": 9, "window": 18}),
    ],
    ids=str,
)
def test_documents(bounds: list[list[int]], options: dict[str, Any]) -> None:
    check((bounds[0][-1], bounds[-1][-1], 3, 1, 16), options, bounds=bounds, sinks=options == {})


def test_documents_by_descriptors(tma: Any) -> None:
    bounds = [[0, 20, 20, 55, 60], [0, 8, 33, 63, 70]]
    check((60, 70, 2, 1, 16), {"window": 18}, dtype=torch.bfloat16, bounds=bounds)


def test_max_seqlen_may_be_unknown() -> None:
    q, bounds = random(50, 2, 16), torch.tensor([0, 17, 50], dtype=torch.int32)
    with mk.use_backend("triton"):
        known = mk.attention(q, q, q, cu_seqlens=bounds, max_seqlen=33)
        unknown = mk.attention(q, q, q, cu_seqlens=bounds)
        # As a batch is brought to a fixed number of documents and a fixed bound of their lengths.
        padded = mk.attention(q, q, q, cu_seqlens=torch.cat([bounds, bounds[-1:].repeat(2)]), max_seqlen=48)
    assert torch.equal(known, unknown)
    assert torch.equal(known, padded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_documents_do_not_leak(dtype: torch.dtype) -> None:
    helpers.do_not_leak("triton", dtype, 16)


def test_documents_do_not_leak_by_descriptors(tma: Any) -> None:
    helpers.do_not_leak("triton", torch.bfloat16, 16)


def test_two_runs_have_the_same_bits() -> None:
    inputs = [random(40, heads, 16, seed=i) for i, heads in enumerate((4, 2, 2))]
    grads = [random(40, 4, 16, seed=4), random(4, 40, seed=5)]
    runs = [ours(inputs, grads, [[0, 23, 40]], {"window": 9}) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_views_of_a_fused_projection() -> None:
    packed = random(2, 20, 4, 16, scale=2.0)
    views = packed.split((2, 1, 1), dim=2)
    grad = random(2, 16, 20, 2).permute(0, 2, 3, 1), random(2, 2, 20)
    got = ours(list(views), list(grad), None, {})
    copied = ours([x.contiguous() for x in views], [x.contiguous() for x in grad], None, {})
    assert all(a.is_contiguous() and torch.equal(a, b) for a, b in zip(got, copied, strict=True))


def test_autograd_and_an_expanded_gradient() -> None:
    results = []
    for backend in ("triton", "reference"):
        q = random(1, 18, 2, 16).requires_grad_()
        with mk.use_backend(backend):
            mk.attention(q, q, q).sum().backward()
        results.append(q.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_empty(rows: int, keys: int) -> None:
    q, k = random(1, rows, 2, 16), random(1, keys, 2, 16)
    got = ours([q, k, k], [q, random(1, 2, rows)], None, {"causal": False})
    assert [x.shape for x in got] == [q.shape, (1, 2, rows), q.shape, k.shape, k.shape]
    assert all((x == 0).all() for i, x in enumerate(got) if i != 1)
    assert (got[1] == -torch.inf).all()


def test_wide_heads_are_refused_with_the_reason() -> None:
    q = random(1, 3, 1, 257)
    with mk.use_backend("triton"), pytest.raises(ValueError, match="takes head dims up to 256, not 257"):
        mk.attention(q, q, q)


def test_sections_and_last_first_own_each_tile_once() -> None:
    """With fewer pairs to a section than there are, the last one short."""
    q = random(3, 40, 2, 16)
    with mk.use_backend("triton"):
        whole = mk.attention(q, q, q)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launchers, "SECTION_BYTES", 2 * 40 * 2 * 16 * 4)
            sections = mk.attention(q, q, q)
    assert torch.equal(whole, sections)
