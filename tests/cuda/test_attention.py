"""The CUDA attention kernels for mma.sync, emulated: every option forwards and backwards, across tiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import megalite_kernels as mk
from megalite_kernels.cases.attention import CASES
from megalite_kernels.cases.base import Case
from megalite_kernels.cases.checking import check_case
from megalite_kernels.native.cuda import attention as launchers
from megalite_kernels.native.cuda import attention_shape, emulated
from megalite_kernels.native.cuda.kernels import attention as kernels
from megalite_kernels.native.cuda.kernels.attention import Tiles
from tests.helpers import attention as helpers
from tests.ops.catalogue import random

check = partial(helpers.check, "cuda", dtype=torch.bfloat16)
ours = partial(helpers.ours, "cuda")
DTYPES = [torch.bfloat16, torch.float16]
SMALL = Tiles(32, 16, 2)


def use_tiles(patch: pytest.MonkeyPatch, tiles: Tiles) -> None:
    """The same tiles for every kernel and width."""
    for table in (kernels.FORWARD, kernels.FORWARD_90, kernels.DK_DV, kernels.DQ):
        for width in table:
            patch.setitem(table, width, tiles)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of which short sequences have several."""
    use_tiles(monkeypatch, SMALL)


@pytest.fixture(autouse=True)
def sm_80(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is emulated: on Hopper other kernels would take these calls."""
    monkeypatch.setattr(launchers, "arch", lambda device: 80)


@pytest.fixture(autouse=True)
def no_bank_conflicts() -> Iterator[None]:
    """The rule of attention_common.cuh holds in every launch."""
    with emulated.reporting() as reports:
        yield
    assert {(report.kernel, report.bank_conflicts) for report in reports if report.bank_conflicts} == set()


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
        (33, 48, {"scale": 60.0}),
        (1, 1, {}),
        (1, 70, {}),
    ],
    ids=str,
)
def test_options(rows: int, keys: int, options: dict[str, Any], small: None) -> None:
    check((rows, keys, 3, 1, 64), options)


@pytest.mark.parametrize(
    "tiles", [Tiles(64, 16, 2), Tiles(32, 32, 2), Tiles(32, 16, 2, 3)], ids=lambda tiles: str(tiles)[5:]
)
def test_tiles(tiles: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 rows a warp, more than one kind of tile, a ring of three stages."""
    use_tiles(monkeypatch, tiles)
    check((75, 70, 2, 1, 64), {"window": 21})
    check((70, 75, 1, 1, 64))


@pytest.mark.parametrize(
    ("dtype", "dim", "rows"), [(torch.bfloat16, 64, 150), (torch.float16, 128, 150)], ids=str
)
def test_shipped_tiles(dtype: torch.dtype, dim: int, rows: int) -> None:
    check((rows, rows + 9, 2, 1, dim), dtype=dtype)


def test_tiles_of_newer_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "arch", lambda device: 100)
    q = random(1, 150, 1, 128).bfloat16()
    with mk.use_backend("cuda"), emulated.reporting() as reports:
        out = mk.attention(q, q, q)
    truth, same = (helpers.plain(x, x, x, None, None, {})[0] for x in (q.double(), q))
    mk.testing.assert_as_accurate(out, same, truth)
    assert reports[0].shared_wavefronts > 0
    assert kernels.forward("bf16", 128, 100).threads == 256


@pytest.mark.parametrize(
    ("architecture", "reason", "taken"), [(90, None, True), (90, "no", False), (100, None, False)]
)
def test_wgmma_takes_what_it_can(
    architecture: int, reason: str | None, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only on sm_90, and only if its kernels say so; forwards and backwards."""
    hopper = SimpleNamespace(
        forward_supports=lambda *args: reason,
        backward_supports=lambda *args: reason,
        forward=lambda *args: ("wgmma", len(args)),
        backward=lambda *args: ("wgmma", len(args)),
    )
    monkeypatch.setattr(launchers, "arch", lambda device: architecture)
    monkeypatch.setattr(launchers, "_hopper", lambda: hopper)
    monkeypatch.setattr(launchers, "forward_mma", lambda *args: ("mma", len(args)))
    monkeypatch.setattr(launchers, "backward_mma", lambda *args: ("mma", len(args)))
    q, options = random(1, 3, 1, 64).bfloat16(), (None, None, None, True, 0, 0, 0, 0.0, 0.125)
    name = "wgmma" if taken else "mma"
    assert launchers.forward(q, q, q, *options) == (name, 12)
    assert launchers.backward(q, None, q, q, q, q, q, *options) == (name, 16)


@pytest.mark.parametrize("dim", [8, 16, 32, 80, 96, 120])
def test_head_dims(dim: int, small: None) -> None:
    """Narrower heads than the columns computed; the rest are zeros."""
    check((33, 33, 2, 1, dim), dtype=torch.float16)


def test_wide_heads_forward() -> None:
    q, k, v = (random(1, 70, 2, 200, seed=i).half() for i in range(3))
    with mk.use_backend("cuda"):
        out = mk.attention(q, k, v)
    truth, _ = helpers.plain(q.double(), k.double(), v.double(), None, None, {})
    same, _ = helpers.plain(q, k, v, None, None, {})
    mk.testing.assert_as_accurate(out, same, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_catalogue(case: Case, dtype: torch.dtype, small: None) -> None:
    wrong = {
        name: str(found) for name, found in check_case(case, dtype, backend="cuda").items() if not found.kept
    }
    assert not wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values(dtype: torch.dtype, small: None) -> None:
    """Logits of ten thousands: one key takes all, nothing overflows."""
    q, k, v = (random(1, 40, 1, 64, seed=i).to(dtype) for i in range(3))
    huge = (q * 90, k * 90, v * 100)
    got = ours(list(huge), [q, random(1, 1, 40)], None, {})
    assert all(torch.isfinite(x).all() for x in got)
    truth, lse = helpers.plain(*(x.double() for x in huge), None, None, {})
    torch.testing.assert_close(got[0].double(), truth, rtol=0.01, atol=0.5)
    torch.testing.assert_close(got[1].double(), lse, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks(dtype: torch.dtype, small: None) -> None:
    check((35, 35, 3, 1, 64), {"window": 12}, dtype=dtype, sinks=True)
    check((20, 3, 2, 2, 64), dtype=dtype, sinks=True, batch=2)


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
def test_documents(bounds: list[list[int]], options: dict[str, Any], small: None) -> None:
    check((bounds[0][-1], bounds[-1][-1], 3, 1, 64), options, bounds=bounds, sinks=options == {})


def test_max_seqlen_may_be_unknown(small: None) -> None:
    q, bounds = random(50, 2, 64).bfloat16(), torch.tensor([0, 17, 50], dtype=torch.int32)
    with mk.use_backend("cuda"):
        known = mk.attention(q, q, q, cu_seqlens=bounds, max_seqlen=33)
        unknown = mk.attention(q, q, q, cu_seqlens=bounds)
        # As a batch is brought to a fixed number of documents and a fixed bound of their lengths.
        padded = mk.attention(q, q, q, cu_seqlens=torch.cat([bounds, bounds[-1:].repeat(2)]), max_seqlen=48)
    assert torch.equal(known, unknown)
    assert torch.equal(known, padded)


def test_documents_do_not_leak(small: None) -> None:
    helpers.do_not_leak("cuda", torch.bfloat16, 64)


def test_raw_ops_pass_opcheck(small: None) -> None:
    q, k = random(1, 18, 2, 64).bfloat16(), random(1, 18, 1, 64, seed=1).bfloat16()
    options = (None, None, None, True, 0, 0, 0, 0.0, 0.125)
    with mk.use_backend("cuda"):
        out, lse = torch.ops.megalite.attention_fwd(q, k, k, *options)
        torch.library.opcheck(torch.ops.megalite.attention_fwd.default, (q, k, k, *options))
        torch.library.opcheck(
            torch.ops.megalite.attention_bwd.default, (q, None, q, k, k, out, lse, *options)
        )


def test_two_runs_have_the_same_bits(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whichever order blocks, warps and lanes run."""
    inputs = [random(40, heads, 64, seed=i).bfloat16() for i, heads in enumerate((4, 2, 2))]
    grads = [random(40, 4, 64, seed=4).bfloat16(), random(4, 40, seed=5)]
    runs = []
    for seed in ("0", "1", "2"):
        monkeypatch.setenv(emulated.SEED, seed)
        runs.append(ours(inputs, grads, [[0, 23, 40]], {"window": 9}))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*runs, strict=True))


def test_views_of_a_fused_projection(small: None) -> None:
    """Strided views are read where they are; a gradient that no 16 bytes of fit is copied."""
    packed = random(2, 20, 4, 64, scale=2.0).bfloat16()
    views = packed.split((2, 1, 1), dim=2)
    grad = random(2, 64, 20, 2).bfloat16().permute(0, 2, 3, 1), random(2, 2, 20)
    got = ours(list(views), list(grad), None, {})
    copied = ours([x.contiguous() for x in views], [x.contiguous() for x in grad], None, {})
    assert all(a.is_contiguous() and torch.equal(a, b) for a, b in zip(got, copied, strict=True))


def test_rows_off_16_bytes_are_copied(small: None) -> None:
    q = random(1, 18, 2, 64).bfloat16()
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    wide = torch.zeros(1, 18, 2, 68, dtype=q.dtype)
    wide[..., :64] = q
    with mk.use_backend("cuda"):
        expected, *others = (mk.attention(x, x, x) for x in (q, shifted, wide[..., :64]))
    assert all(torch.equal(expected, other) for other in others)


def test_autograd_and_an_expanded_gradient(small: None) -> None:
    results = []
    for backend in ("cuda", "reference"):
        q = random(1, 18, 2, 64).half().requires_grad_()
        with mk.use_backend(backend):
            mk.attention(q, q, q).sum().backward()
        results.append(q.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_empty(rows: int, keys: int, small: None) -> None:
    q, k = random(1, rows, 2, 64).bfloat16(), random(1, keys, 2, 64).bfloat16()
    got = ours([q, k, k], [q, random(1, 2, rows)], None, {"causal": False})
    assert [x.shape for x in got] == [q.shape, (1, 2, rows), q.shape, k.shape, k.shape]
    assert all((x == 0).all() for i, x in enumerate(got) if i != 1)
    assert (got[1] == -torch.inf).all()


def test_what_is_refused_and_why() -> None:
    wide, odd, single = random(1, 3, 1, 264).half(), random(1, 3, 1, 20).half(), random(1, 3, 1, 64)
    q = random(1, 3, 1, 136).half().requires_grad_()
    with mk.use_backend("cuda"):
        for x, reason in (
            (wide, "multiples of 8 up to 256, not 264"),
            (odd, "multiples of 8 up to 256, not 20"),
        ):
            with pytest.raises(ValueError, match=reason):
                mk.attention(x, x, x)
        with pytest.raises(ValueError, match="takes bfloat16 and float16, not"):
            mk.attention(single, single, single)
        with pytest.raises(ValueError, match="multiples of 8 up to 128, not 136"):
            mk.attention(q, q, q).sum().backward()


def test_sections_and_last_first_own_each_tile_once(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer pairs to a section than there are, the last one short."""
    q = random(3, 40, 2, 64).bfloat16()
    with mk.use_backend("cuda"):
        whole = mk.attention(q, q, q)
        monkeypatch.setattr(attention_shape, "SECTION_BYTES", 2 * 40 * 2 * 64 * 2)
        sections = mk.attention(q, q, q)
    assert torch.equal(whole, sections)


def test_key_blocks_that_no_query_sees_are_not_read(small: None) -> None:
    """A causal pass reads about half of what a full one does, a window less."""
    q = random(1, 160, 1, 64).bfloat16()
    read = {}
    for name, options in {"full": {"causal": False}, "causal": {}, "window": {"window": 16}}.items():
        with mk.use_backend("cuda"), emulated.reporting() as reports:
            mk.attention(q, q, q, **options)
        read[name] = reports[0].global_read_bytes
    assert read["causal"] < 0.68 * read["full"]
    assert read["window"] < 0.5 * read["full"]


def test_shared_memory_fits_consumer_gpus() -> None:
    for element in kernels.ELEMENTS:
        made = [kernels.forward(element, width, 80) for width in kernels.FORWARD_WIDTHS]
        made += [kernels.forward(element, width, 90) for width in kernels.FORWARD_WIDTHS]
        made += [
            make(element, width) for make in (kernels.dk_dv, kernels.dq) for width in kernels.BACKWARD_WIDTHS
        ]
        assert all(kernel.shared_bytes <= 99 << 10 for kernel in made)
