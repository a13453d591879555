"""The attention kernels of Hopper, emulated: TMA, mbarriers, wgmma and warp specialisation, forward and backward.

Shapes cross a block's rows (128 or 192), a tile of the ring (64 or 128), and the stages of the ring.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.native.cuda import attention_hopper, emulated, runtime
from megalite_kernels.native.cuda.kernels import attention_hopper as kernels
from tests.helpers import attention as helpers
from tests.ops.catalogue import random

check = partial(helpers.check, "cuda")
ours = partial(helpers.ours, "cuda")
BF16, FP16 = torch.bfloat16, torch.float16
FORWARD, DK_DV, DQ = (f"attention_hopper_{name}" for name in ("forward", "dk_dv", "dq"))
HOPPER = {FORWARD, DK_DV, DQ, "attention_statistics"}


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[emulated.Report]]:
    """An sm_90, whatever the rest of the suite emulates; in no launch do threads collide on a bank."""
    monkeypatch.setenv(runtime.EMULATE, "90")
    with emulated.reporting() as reports:
        yield reports
    assert {(report.kernel, report.bank_conflicts) for report in reports if report.bank_conflicts} == set()


@pytest.fixture
def only_hopper(launched: list[emulated.Report]) -> Iterator[None]:
    """These kernels took every call."""
    yield
    assert {report.kernel for report in launched} == HOPPER


@pytest.mark.usefixtures("only_hopper")
@pytest.mark.parametrize(
    ("shapes", "dtype", "options"),
    [
        ((200, 200, 2, 1, 128), BF16, {}),
        ((130, 300, 1, 1, 128), FP16, {"causal": False}),
        ((300, 200, 2, 2, 64), FP16, {"causal": False, "scale": 0.3}),
        ((193, 257, 2, 1, 64), BF16, {}),
        ((17, 650, 1, 1, 64), BF16, {"causal": False}),
        ((1, 1, 1, 1, 64), BF16, {}),
        ((70, 140, 1, 1, 64), BF16, {"scale": 9.0}),  # maxima far apart: nearly all probabilities are 0
    ],
    ids=str,
)
def test_shapes(shapes: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]) -> None:
    check(shapes, options, dtype=dtype)


@pytest.mark.usefixtures("only_hopper")
@pytest.mark.parametrize(
    "options",
    [
        {"window": 40},
        {"window": 90, "causal": False},
        {"offset": -150},
        {"offset": -400},
        {"offset": 120, "window": 150},
        {"offset": -30, "window": 20, "causal": False},
    ],
    ids=str,
)
def test_what_is_seen(options: dict[str, Any]) -> None:
    """Rows that see no key, blocks seen in part at both ends, and blocks that nobody sees."""
    check((260, 250, 1, 1, 64), options, dtype=BF16)


@pytest.mark.usefixtures("only_hopper")
@pytest.mark.parametrize(
    ("dim", "options"), [(64, {}), (128, {}), (64, {"window": 50, "causal": False})], ids=str
)
def test_documents(dim: int, options: dict[str, Any]) -> None:
    bounds = [[0, 20, 20, 215, 260], [0, 20, 30, 225, 270]]
    check((260, 270, 2, 1, dim), options, dtype=BF16, bounds=bounds)


@pytest.mark.usefixtures("only_hopper")
@pytest.mark.parametrize("dim", kernels.DIMS)
def test_documents_do_not_leak(dim: int) -> None:
    helpers.do_not_leak("cuda", BF16, dim)


@pytest.mark.usefixtures("only_hopper")
def test_a_batch_of_fused_projections() -> None:
    """Strides that TMA reads as they are, and entries whose last tiles don't run into the next."""
    packed = random(2, 70, 4, 64, scale=2.0).to(BF16)
    views = list(packed.split((2, 1, 1), dim=2))
    grads = [random(2, 2, 70, 64).to(BF16).transpose(1, 2), random(2, 2, 70)]
    got = ours(views, grads, None, {})
    copied = ours([x.contiguous() for x in views], [x.contiguous() for x in grads], None, {})
    assert all(a.is_contiguous() and torch.equal(a, b) for a, b in zip(got, copied, strict=True))
    one = ours([x[1:] for x in views], [x[1:] for x in grads], None, {})
    assert all(torch.equal(a[1:], b) for a, b in zip(got, one, strict=True))


@pytest.mark.usefixtures("only_hopper")
def test_layouts_that_tma_cannot_read_are_copied() -> None:
    odd = random(1, 40, 1, 72).to(BF16)[..., 3:67]
    grads = [torch.ones(1, 1, 1, 1, dtype=BF16).expand(1, 40, 1, 64), random(1, 1, 40)]
    got = ours([odd, odd, odd], grads, None, {})
    copied = ours([odd.contiguous()] * 3, [x.contiguous() for x in grads], None, {})
    assert all(torch.equal(a, b) for a, b in zip(got, copied, strict=True))


@pytest.mark.usefixtures("only_hopper")
def test_any_order_of_warps_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [random(1, 200, heads, 128, seed=i).to(BF16) for i, heads in enumerate((2, 1, 1))]
    grads = [random(1, 200, 2, 128, seed=4).to(BF16), random(1, 2, 200, seed=5)]
    runs = []
    for seed in ("0", "5"):
        monkeypatch.setenv(emulated.SEED, seed)
        runs.append(ours(inputs, grads, None, {}))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_other_calls_go_to_mma(launched: list[emulated.Report], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a soft-cap, without any key, and on another architecture."""
    q = random(1, 40, 1, 64).to(BF16)
    with mk.use_backend("cuda"):
        leaf = q.clone().requires_grad_()
        mk.attention(leaf, q, q).sum().backward()
        assert mk.attention(q, q[:, :0], q[:, :0], causal=False).eq(0.0).all()
        mk.attention(q, q, q, softcap=9.0)
        monkeypatch.setenv(runtime.EMULATE, "80")
        mk.attention(q, q, q)
    expected = [FORWARD, "attention_statistics", DK_DV, DQ, *["attention_forward"] * 3]
    assert [report.kernel for report in launched] == expected


def test_what_is_refused_says_why() -> None:
    q = random(1, 3, 1, 64).to(BF16)
    rest = {"causal": True, "window": 0, "offset": 0, "max_seqlen": 0, "softcap": 0.0, "scale": 0.125}

    def reason(q: Tensor = q, sinks: Tensor | None = None, **options: Any) -> str:
        return str(attention_hopper.forward_supports(q, q, q, None, None, sinks, **(rest | options)))

    assert reason() == "None"
    assert "head dims 64 and 128, not 96" in reason(random(1, 3, 1, 96).to(BF16))
    assert "bfloat16 and float16, not torch.float32" in reason(q.float())
    assert "no empty tensors" in reason(q[:, :0])
    assert "no soft-cap, not 30" in reason(softcap=30.0)
    assert "no sinks" in reason(sinks=random(1))
    assert "a positive scale, not -0.1" in reason(scale=-0.1)
    assert "not 3, 3 and 536870912" in reason(offset=1 << 29)
