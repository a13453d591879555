"""The losses' kernels, interpreted: blocks so small that rows take several, with a ragged and with an empty one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.ops.cross_entropy_local import cross_entropy_grad, cross_entropy_grad_
from megalite_kernels.triton.launch import Launch, override
from tests.helpers.margins import surrounded, surrounded_outputs
from tests.ops import test_cross_entropy as ops
from tests.ops import test_cross_entropy_local as local
from tests.ops.catalogue import check, random

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# numpy, which interprets, says so where infinities meet; that they do is the subject of some tests.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    with (
        override("cross_entropy_rows", Launch({"BLOCK_V": 16})),
        override("scaled_copy", Launch({"BLOCK": 256})),
    ):
        yield


@pytest.mark.parametrize(
    ("classes", "options", "dtype"),
    [
        *((53, options, torch.float32) for options in ops.OPTIONS),
        *((53, ops.OPTIONS[4], dtype) for dtype in DTYPES[:2]),
        *((48, options, torch.bfloat16) for options in (ops.OPTIONS[0], ops.OPTIONS[4])),
        (1, ops.OPTIONS[4], torch.float32),
    ],
)
def test_accuracy(classes: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Three whole blocks; three and a ragged one, with rows that begin off the alignment; one class."""
    target = ops.targets(4, classes)
    check(
        lambda x: mk.cross_entropy(x, target, reduction="none", **options),
        lambda x: ops.plain(x, target, "none", **options),
        [random(4, classes, scale=3)],
        dtype=dtype,
        backend="triton",
        magnitude=3.0,
        floor=2,
    )


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_logits_do_not_overflow(offset: float) -> None:
    ops.test_large_logits_do_not_overflow(offset, "triton")


def test_a_large_vocabulary_sums_accurately() -> None:
    with override("cross_entropy_rows", Launch({"BLOCK_V": 16384})):
        ops.test_a_large_vocabulary_sums_accurately("triton")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("column", "softcap"), [(3, None), (40, None), (2100, None), (2100, 5.0)])
def test_non_finite_values_do_what_they_do_in_torch(column: int, softcap: float | None, value: float) -> None:
    with override("cross_entropy_rows", Launch({"BLOCK_V": 512})):
        ops.test_non_finite_values_do_what_they_do_in_torch(column, softcap, value, "triton")


def test_masked_classes_views_ignored_and_empty() -> None:
    with override("cross_entropy_rows", Launch({"BLOCK_V": 512})):
        ops.test_minus_infinity_masks_a_class("triton")
    ops.test_columns_of_a_wider_tensor_need_no_copy("triton")
    ops.test_other_ignore_index_higher_dims_and_empty("triton")
    for reduction in ("none", "mean"):
        ops.test_nothing_to_learn_gives_zero_loss_and_gradient(reduction, "triton")


def test_nothing_but_masked_classes() -> None:
    """logsumexp of no finite logit is -inf, as torch has it."""
    logits = torch.full((2, 40), -torch.inf)
    with mk.use_backend("triton"):
        _, lse = torch.ops.megalite.cross_entropy_fwd(logits, torch.tensor([0, 39]), -100, 0.0, 0.0, 0.0)
    assert torch.equal(lse, torch.full((2,), -torch.inf))


@pytest.mark.parametrize("bad", [-1, 11])
def test_targets_out_of_range_give_nan(bad: int) -> None:
    with mk.use_backend("triton"):
        loss = mk.cross_entropy(random(2, 11), torch.tensor([0, bad]), reduction="none")
    assert torch.isnan(loss).tolist() == [False, True]


@pytest.mark.parametrize(
    ("division", "options", "dtype"),
    [
        (3, ops.OPTIONS[0], torch.float32),
        (4, ops.OPTIONS[4], torch.bfloat16),
        (5, ops.OPTIONS[4], torch.float16),
    ],
)
def test_divided(
    division: int, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of several blocks, one of a single class, one of padding alone."""
    monkeypatch.setattr(local, "ROWS", 5)
    local.test_accuracy(local.DIVISIONS[division], options, dtype, "triton", monkeypatch)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("stride", [53, 64])
def test_padding_columns_and_everything_around_a_row(stride: int, in_place: bool) -> None:
    """Gradients write their own columns only, whether rows begin aligned or not."""
    storage = random(5, stride)
    logits, target, lse = storage[:, :50], torch.tensor([0, 48, -100, 49, 17]), torch.full((5,), 4.0)
    expected = storage.clone()
    with mk.use_backend("reference"):
        expected[:, :50] = cross_entropy_grad(logits, target, lse, torch.tensor(2.0), valid_rows=49)
    gradient = cross_entropy_grad_ if in_place else cross_entropy_grad
    with mk.use_backend("triton"):
        grad = gradient(logits, target, lse, torch.tensor(2.0), valid_rows=49)
    torch.testing.assert_close(grad, expected[:, :50])
    assert torch.equal(storage[:, 50:], expected[:, 50:])
    if in_place:
        torch.testing.assert_close(storage, expected)


@pytest.mark.parametrize(
    ("reduction", "dtype"), [("none", torch.bfloat16), ("mean", torch.float16), ("sum", torch.float32)]
)
def test_linear(reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with override("cross_entropy_rows", Launch({"BLOCK_V": 32})):
        ops.test_linear(True, reduction, ops.OPTIONS[4], dtype, "triton", monkeypatch)


def test_linear_adds_into_the_main_gradient_and_repeats() -> None:
    with override("cross_entropy_rows", Launch({"BLOCK_V": 32})):
        ops.test_linear_adds_into_the_main_gradient("none", "triton")
        ops.test_backward_twice_gives_the_same_twice(torch.bfloat16, "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 256, 1001])
def test_scaled_copy(size: int, dtype: torch.dtype) -> None:
    x, scale = random(size), torch.tensor(1 / 3)

    def copied(backend: str) -> Tensor:
        with mk.use_backend(backend):
            result: Tensor = torch.ops.megalite.scaled_copy(x, scale, dtype)
        return result

    assert torch.equal(copied("triton"), copied("reference"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [48, 53])
def test_kernels_stay_within_their_tensors(classes: int, dtype: torch.dtype) -> None:
    """Rows that begin aligned and not, a ragged end, a row without a loss."""
    logits, target, scale = random(3, classes).to(dtype), ops.targets(3, classes), torch.tensor(0.7)
    calls = torch.ops.megalite

    def results(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
        options, shard = (-100, 0.1, 0.01, 3.0), (0, classes - 2, classes)
        x, factor = place(logits), place(scale)
        loss, lse = calls.cross_entropy_fwd(x, target, *options)
        stats = calls.cross_entropy_local_fwd(x, target, *shard[:2], *options)
        grad = calls.cross_entropy_local_bwd(x, target, place(lse), factor, *shard, *options)
        copied = calls.scaled_copy(x, factor, dtype)
        both = calls.cross_entropy_grad_(x, target, factor, *options)
        return [loss, lse, stats, grad, copied, *both, x]

    with mk.use_backend("triton"):
        expected = results(torch.clone)
        with surrounded_outputs():
            found = results(surrounded)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    around = torch.as_strided(found[-1], (256 + logits.numel(),), (1,), 0)
    assert bool(torch.isnan(torch.cat([around[:128], around[-128:]])).all())
