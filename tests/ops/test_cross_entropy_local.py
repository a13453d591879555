"""The losses over a divided vocabulary equal the undivided ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.ops.cross_entropy_local import (
    cross_entropy_combine,
    cross_entropy_grad,
    cross_entropy_grad_,
    cross_entropy_local,
)
from megalite_kernels.ops.linear_cross_entropy_local import (
    linear_cross_entropy_local,
    linear_cross_entropy_local_grad,
)
from megalite_kernels.testing import assert_as_accurate
from tests.ops.catalogue import BACKENDS, DTYPES, random
from tests.ops.test_cross_entropy import OPTIONS, plain, small_chunks, targets

CLASSES, ROWS, HIDDEN = 101, 37, 24
DIVISIONS: list[list[tuple[int, int]]] = [
    [(101, 0)],
    [(101, 27)],
    [(64, 0), (37, 27)],
    [(40, 0), (40, 0), (21, 19)],
    [(33, 0), (67, 1), (1, 33), (0, 34)],
    [(0, 5), (101, 0)],
]
"""(classes, padding rows) of each shard; a shard may be all padding."""


class Case(NamedTuple):
    """Hidden states, head and targets, and what the undivided loss gives for them."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    scale: Tensor

    def cast(self, dtype: torch.dtype) -> Case:
        wide = torch.promote_types(dtype, torch.float32)
        return Case(
            *(t.to(dtype) for t in (self.x, self.weight, self.bias)), self.target, self.scale.to(wide)
        )


def case(scale: str = "token") -> Case:
    scales = random(ROWS, seed=5) if scale == "token" else torch.tensor(0.3)
    return Case(
        random(ROWS, HIDDEN), random(CLASSES, HIDDEN, seed=1, scale=0.5), random(CLASSES, seed=2),
        targets(ROWS, CLASSES), scales,
    )  # fmt: skip


def padded(part: Tensor, rows: int) -> Tensor:
    """With NaN after it: whatever padding holds, nobody may see it."""
    return torch.cat([part, part.new_full((rows, *part.shape[1:]), torch.nan)])


def shards(division: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(first class, classes, padding) of each."""
    starts = [sum(classes for classes, _ in division[:i]) for i in range(len(division))]
    return [(start, classes, rows) for start, (classes, rows) in zip(starts, division, strict=True)]


def from_logits(
    data: Case, division: list[tuple[int, int]], *, in_place: bool, **options: Any
) -> list[Tensor]:
    """loss, lse and dlogits [T, V] of logits x @ weight.T + bias, put together from the shards'."""
    logits = F.linear(data.x, data.weight, data.bias)
    parts = [
        padded(logits[:, start : start + classes].t(), rows).t().contiguous()
        for start, classes, rows in shards(division)
    ]
    places = [{"vocab_start": start, "valid_rows": classes} for start, classes, _ in shards(division)]
    stats = [
        cross_entropy_local(part, data.target, **place, **options)
        for part, place in zip(parts, places, strict=True)
    ]
    loss, lse = cross_entropy_combine(torch.stack(stats), data.target, vocab_size=CLASSES, **options)
    pieces = []
    for part, place in zip(parts, places, strict=True):
        gradient = cross_entropy_grad_ if in_place else cross_entropy_grad
        grad = gradient(part, data.target, lse, data.scale, **place, vocab_size=CLASSES, **options)
        assert (grad.data_ptr() == part.data_ptr()) == (in_place and part.numel() > 0) or not part.numel()
        valid = place["valid_rows"]
        assert torch.equal(grad[:, valid:], torch.zeros_like(grad[:, valid:]))
        pieces.append(grad[:, :valid])
    return [loss, lse, torch.cat(pieces, 1)]


def from_hidden(
    data: Case, division: list[tuple[int, int]], *, main_grad: bool, **options: Any
) -> list[Tensor]:
    """loss, lse, dx, dweight, dbias, put together from the shards'."""
    parts = []
    for start, classes, rows in shards(division):
        part = slice(start, start + classes)
        parts.append((padded(data.weight[part], rows), padded(data.bias[part], rows), start, classes))
    stats = [
        linear_cross_entropy_local(
            data.x, weight, data.target, bias=bias, vocab_start=start, valid_rows=classes, **options
        )
        for weight, bias, start, classes in parts
    ]
    loss, lse = cross_entropy_combine(torch.stack(stats), data.target, vocab_size=CLASSES, **options)
    dx, dweights, dbiases = torch.zeros(ROWS, HIDDEN, dtype=lse.dtype), [], []
    for weight, bias, start, classes in parts:
        accumulator = torch.ones(weight.shape, dtype=lse.dtype) if main_grad else None
        part_dx, dweight, dbias = linear_cross_entropy_local_grad(
            data.x, weight, data.target, lse, data.scale, bias=bias, vocab_start=start, valid_rows=classes,
            vocab_size=CLASSES, main_grad=accumulator, **options,
        )  # fmt: skip
        assert part_dx.dtype == data.x.dtype
        assert (dweight is None) == main_grad
        dweight = accumulator - 1 if accumulator is not None else dweight
        assert dweight is not None
        assert dbias is not None
        for grad in (dweight, dbias):
            assert torch.equal(grad[classes:], torch.zeros_like(grad[classes:]))
        dx += part_dx
        dweights.append(dweight[:classes])
        dbiases.append(dbias[:classes])
    return [loss, lse, dx, torch.cat(dweights), torch.cat(dbiases)]


def undivided(data: Case, *, linear: bool, **options: Any) -> list[Tensor]:
    """The same from plain torch over the whole vocabulary."""
    leaves = [t.detach().requires_grad_() for t in (data.x, data.weight, data.bias)]
    logits = F.linear(*leaves)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    loss = plain(logits, data.target, "none", **options)
    grads = torch.autograd.grad((loss * data.scale).sum(), leaves if linear else logits)
    return [loss.detach(), scores.logsumexp(-1).detach(), *grads]


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("scale", ["token", "scalar"])
def test_float64_equals_the_undivided_loss(
    scale: str, division: list[tuple[int, int]], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch)
    data = case(scale).cast(torch.float64)
    expected = undivided(data, linear=False, **options)
    for in_place in (False, True):
        close(from_logits(data, division, in_place=in_place, **options), expected)
    expected = undivided(data, linear=True, **options)
    for main_grad in (False, True):
        close(from_hidden(data, division, main_grad=main_grad, **options), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("division", DIVISIONS)
def test_accuracy(
    division: list[tuple[int, int]],
    options: dict[str, Any],
    dtype: torch.dtype,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_chunks(monkeypatch)
    data = case().cast(dtype)
    wide = data.cast(torch.float64)
    for linear in (False, True):
        with mk.use_backend(backend):
            results = [
                from_hidden(data, division, main_grad=flag, **options)
                if linear
                else from_logits(data, division, in_place=flag, **options)
                for flag in (False, True)
            ]
        # Logits that are rounded to the dtype are the data of the loss from logits.
        same, truth = (undivided(d, linear=linear, **options) for d in (data, wide))
        if not linear:
            truth = _from_rounded_logits(data, options)
        for got in results:
            for index, (a, b, c) in enumerate(zip(got, same, truth, strict=True)):
                assert_as_accurate(a, b.to(a.dtype), c, floor=6, magnitude=1.0, name=f"result {index}")


def _from_rounded_logits(data: Case, options: dict[str, Any]) -> list[Tensor]:
    logits = F.linear(data.x, data.weight, data.bias).double()
    identity = torch.eye(CLASSES, dtype=torch.float64)
    rounded = Case(logits, identity, torch.zeros(CLASSES).double(), data.target, data.scale.double())
    return undivided(rounded, linear=False, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_all_in_another_shard(backend: str) -> None:
    logits, target = random(6, 40), torch.full((6,), 70)
    with mk.use_backend(backend):
        stats = cross_entropy_local(logits, target)
        grad = cross_entropy_grad(logits, target, stats[0] + 9, torch.tensor(1.0), vocab_size=101)
    assert torch.equal(stats[2], torch.zeros(6))
    torch.testing.assert_close(grad, torch.exp(logits - stats[0].unsqueeze(1) - 9))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_lost_where_a_token_has_no_class_or_no_number(backend: str) -> None:
    """A target beyond the vocabulary gives NaN; NaN and infinite logits are seen in every shard's loss."""
    logits, target = random(5, 8), torch.tensor([3, 101, -1, -100, 7])
    logits[0, 2], logits[4, 1] = torch.nan, -torch.inf
    with mk.use_backend(backend):
        stats = [
            cross_entropy_local(logits[:, part], target, vocab_start=part.start)
            for part in (slice(0, 4), slice(4, 8))
        ]
    loss, _ = cross_entropy_combine(torch.stack(stats), target, vocab_size=8)
    assert torch.isnan(loss).tolist() == [True, True, True, False, False]
    assert loss[3] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str) -> None:
    none = torch.empty(0, dtype=torch.int64)
    with mk.use_backend(backend):
        assert cross_entropy_local(torch.empty(0, 5), none).shape == (4, 0)
        assert cross_entropy_grad(torch.empty(0, 5), none, torch.empty(0), torch.ones(())).shape == (0, 5)
        assert linear_cross_entropy_local(torch.empty(0, 3), torch.ones(5, 3), none).shape == (4, 0)
        dx, dweight, dbias = linear_cross_entropy_local_grad(
            torch.empty(0, 3), torch.ones(5, 3), none, torch.empty(0), torch.ones(())
        )
    assert dx.shape == (0, 3)
    assert dweight is not None
    assert torch.equal(dweight, torch.zeros(5, 3))
    assert dbias is None


def test_inputs_are_not_written() -> None:
    data = case()
    before = [t.clone() for t in data]
    from_logits(data, DIVISIONS[3], in_place=False)
    from_hidden(data, DIVISIONS[3], main_grad=False)
    assert all(torch.equal(a, b) for a, b in zip(data, before, strict=True))


def test_errors_name_value_and_limit() -> None:
    logits, target, lse, scale = random(4, 9), torch.zeros(4).long(), torch.zeros(4), torch.ones(())
    with pytest.raises(ValueError, match=r"valid_rows=10 must be between 0 and the 9 columns of logits"):
        cross_entropy_local(logits, target, valid_rows=10)
    with pytest.raises(ValueError, match=r"classes 95 to 104 are not within vocab_size=101"):
        cross_entropy_grad(logits, target, lse, scale, vocab_start=95, vocab_size=101)
    with pytest.raises(ValueError, match=r"stats has shape \[4, 9\]: stack the \[4, T\] of all shards"):
        cross_entropy_combine(logits, target, vocab_size=9)
    with pytest.raises(ValueError, match=r"lse has shape \[3\], but target with 4 tokens needs \[4\]"):
        cross_entropy_grad(logits, target, lse[:3], scale)
    with pytest.raises(ValueError, match=r"scale has shape \[2\], but target with 4 tokens needs \[4\]"):
        linear_cross_entropy_local_grad(logits, logits[:, :9], target, lse, torch.ones(2))
    with pytest.raises(ValueError, match=r"logits have shape \[2, 2, 9\]: flatten them"):
        cross_entropy_local(logits.view(2, 2, 9), target)
    with pytest.raises(ValueError, match=r"logits have stride \(1, 4\): pass contiguous rows"):
        cross_entropy_grad_(random(9, 4).t(), target, lse, scale)
