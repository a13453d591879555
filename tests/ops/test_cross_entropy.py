"""cross_entropy and linear_cross_entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.reference import linear_cross_entropy as plan
from tests.ops.catalogue import BACKENDS, DEVICE, DTYPES, check, generator, random

OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 5.0},
    {"label_smoothing": 0.2, "z_loss": 0.02, "softcap": 3.0},
]


def targets(rows: int, classes: int) -> Tensor:
    """Random classes, with the first, the last and an ignored one among them."""
    target = torch.randint(0, classes, (rows,), generator=generator(7), device="cpu").to(DEVICE)
    target[0], target[-1] = classes - 1, 0
    if rows > 2:
        target[1] = -100
    return target


def plain(logits: Tensor, target: Tensor, reduction: str, **options: Any) -> Tensor:
    """torch's own cross-entropy in float32, with the soft-cap and z-loss written out."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    loss = F.cross_entropy(
        scores, target, label_smoothing=options.get("label_smoothing", 0.0), reduction="none"
    )
    valid = target != -100
    loss = loss + torch.where(valid, options.get("z_loss", 0.0) * scores.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / valid.sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("rows", "classes"), [(3, 1), (7, 101), (5, 4096)])
def test_accuracy(rows: int, classes: int, options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    target = targets(rows, classes)
    for reduction in ("none", "sum", "mean"):
        check(
            lambda x: mk.cross_entropy(x, target, reduction=reduction, **options),  # noqa: B023
            lambda x: plain(x, target, reduction, **options),  # noqa: B023
            [random(rows, classes, scale=3)],
            dtype=dtype,
            backend=backend,
            magnitude=3.0,
            floor=2,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_vocabulary_sums_accurately(backend: str) -> None:
    target = targets(2, 200_003)
    check(
        lambda x: mk.cross_entropy(x, target),
        lambda x: plain(x, target, "mean"),
        [random(2, 200_003)],
        dtype=torch.float32,
        backend=backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_logits_do_not_overflow(offset: float, backend: str) -> None:
    target = targets(4, 50)
    check(
        lambda x: mk.cross_entropy(x, target, reduction="sum"),
        lambda x: plain(x, target, "sum"),
        [random(4, 50) + offset],
        dtype=torch.float32,
        backend=backend,
        magnitude=abs(offset),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_logits_give_a_float32_loss(backend: str) -> None:
    logits = random(6, 33).bfloat16()
    with mk.use_backend(backend):
        loss = mk.cross_entropy(logits, targets(6, 33))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain(logits, targets(6, 33), "mean"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_nothing_to_learn_gives_zero_loss_and_gradient(reduction: str, backend: str) -> None:
    target = torch.full((4,), -100)
    weight = random(9, 8).requires_grad_()
    with mk.use_backend(backend):
        for logits, loss_of in (
            (random(4, 9).requires_grad_(), lambda x: mk.cross_entropy(x, target, reduction=reduction)),
            (
                random(4, 8).requires_grad_(),
                lambda x: mk.linear_cross_entropy(x, weight, target, reduction=reduction),
            ),
        ):
            loss = loss_of(logits)
            (grad,) = torch.autograd.grad(loss.sum(), logits)
            assert torch.equal(loss, torch.zeros_like(loss))
            assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_logits_are_seen_in_their_row_alone(value: float, backend: str) -> None:
    logits = random(3, 40)
    logits[1, 39] = value
    with mk.use_backend(backend):
        loss = mk.cross_entropy(logits, torch.tensor([1, 2, 3]), reduction="none")
    assert torch.isfinite(loss).tolist() == [True, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_ignore_index_higher_dims_and_empty(backend: str) -> None:
    logits, target = random(2, 3, 11), torch.tensor([[0, 5, 10], [5, 5, 1]])
    with mk.use_backend(backend):
        loss = mk.cross_entropy(logits, target, ignore_index=5, reduction="none")
        empty = mk.cross_entropy(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), reduction="sum")
    assert loss.shape == (2, 3)
    assert torch.equal(loss == 0, target == 5)
    assert empty.item() == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [-1, 11])
def test_targets_out_of_range_are_refused(bad: int, backend: str) -> None:
    target = torch.tensor([0, bad])
    with (
        mk.use_backend(backend),
        pytest.raises((ValueError, RuntimeError), match=r"target\[1\]|out of bounds"),
    ):
        mk.cross_entropy(random(2, 11), target)


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one ragged, and several pieces of the weight's gradient."""
    monkeypatch.setattr(plan, "CPU_LIMITS", plan.ChunkLimits(16, 1 << 20, 16))
    monkeypatch.setattr(plan, "PIECE_BYTES", 30 * 24 * 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(
    with_bias: bool,
    reduction: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_chunks(monkeypatch)
    target = targets(41, 67)
    inputs = [random(41, 24), random(67, 24, seed=1, scale=0.5)] + ([random(67, seed=2)] if with_bias else [])

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return mk.linear_cross_entropy(x, weight, target, bias=bias, reduction=reduction, **options)

    def torch_loss(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return plain(F.linear(x, weight, bias), target, reduction, **options)

    check(ours, torch_loss, inputs, dtype=dtype, backend=backend, floor=4, magnitude=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_without_gradients_gives_the_same_loss(backend: str) -> None:
    x, weight, target = (
        random(30, 16).requires_grad_(),
        random(50, 16, seed=1).requires_grad_(),
        targets(30, 50),
    )
    with mk.use_backend(backend):
        trained = mk.linear_cross_entropy(x, weight, target, reduction="sum")
        with torch.no_grad():
            evaluated = mk.linear_cross_entropy(x, weight, target, reduction="sum")
    torch.testing.assert_close(trained.detach(), evaluated, rtol=1e-6, atol=0)
    assert not evaluated.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_linear_adds_into_the_main_gradient(reduction: str, backend: str) -> None:
    x, weight, target = (
        random(30, 16).requires_grad_(),
        random(50, 16, seed=1).requires_grad_(),
        targets(30, 50),
    )
    main_grad = torch.ones(50, 16)
    with mk.use_backend(backend):
        expected = torch.autograd.grad(
            3 * mk.linear_cross_entropy(x, weight, target, reduction=reduction).sum(), (x, weight)
        )
        loss = 3 * mk.linear_cross_entropy(x, weight, target, reduction=reduction, main_grad=main_grad).sum()
        loss.backward()
    assert weight.grad is None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(main_grad, 1 + expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_gradient_known_beforehand_is_in_what_the_forward_makes(
    reduction: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch)
    x, weight, bias, target = (
        random(41, 16).requires_grad_(),
        random(50, 16, seed=1).requires_grad_(),
        random(50, seed=2).requires_grad_(),
        targets(41, 50),
    )
    scale, main_grad = torch.tensor(0.37), torch.ones(50, 16)
    with mk.use_backend(backend):
        plain = mk.linear_cross_entropy(x, weight, target, bias=bias, reduction=reduction)
        expected = torch.autograd.grad(scale * plain, (x, weight, bias))
        known = {"bias": bias, "reduction": reduction, "grad_scale": scale}
        loss = mk.linear_cross_entropy(x, weight, target, **known)
        torch.testing.assert_close(torch.autograd.grad(scale * loss, (x, weight, bias)), expected)
        loss = mk.linear_cross_entropy(x, weight, target, **known, main_grad=main_grad)
        torch.testing.assert_close(main_grad, 1 + expected[1])  # in the forward
        (scale * loss).backward()
    assert torch.equal(loss, plain)
    assert weight.grad is None
    torch.testing.assert_close(main_grad, 1 + expected[1])  # once
    torch.testing.assert_close((x.grad, bias.grad), expected[::2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 41])
def test_the_main_gradient_may_be_overwritten(
    tokens: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are padding, too, and with no tokens at all."""
    small_chunks(monkeypatch)
    x, weight = random(tokens, 16).requires_grad_(), random(56, 16, seed=1).requires_grad_()
    target, one = targets(41, 50)[:tokens], torch.ones(())
    added, overwritten = torch.zeros(56, 16), torch.full((56, 16), torch.nan)
    with mk.use_backend(backend):
        for main_grad, add in ((added, True), (overwritten, False)):
            mk.linear_cross_entropy(
                x, weight, target, reduction="sum", valid_rows=50,
                main_grad=main_grad, main_grad_add=add, grad_scale=one,
            )  # fmt: skip
    torch.testing.assert_close(overwritten, added)
    with pytest.raises(ValueError, match="main_grad_add=False needs main_grad and grad_scale: pass both"):
        mk.linear_cross_entropy(x, weight, target, main_grad=added, main_grad_add=False)


def test_another_gradient_than_the_one_known_beforehand_is_refused() -> None:
    x, weight, target = random(4, 8).requires_grad_(), random(9, 8, seed=1), targets(4, 9)
    loss = mk.linear_cross_entropy(x, weight, target, grad_scale=torch.tensor(0.5))
    with pytest.raises(RuntimeError, match="the loss gets another gradient than its grad_scale"):
        loss.backward()
    with pytest.raises(ValueError, match='grad_scale is of a scalar loss: pass reduction="sum" or "mean"'):
        mk.linear_cross_entropy(x, weight, target, reduction="none", grad_scale=torch.tensor(0.5))
    with pytest.raises(
        ValueError, match=r"grad_scale is torch.float32 of shape \[4\]: pass a floating-point scalar"
    ):
        mk.linear_cross_entropy(x, weight, target, grad_scale=torch.ones(4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_main_gradient_may_be_a_view(reduction: str, dtype: torch.dtype, backend: str) -> None:
    x, weight = random(30, 16).to(dtype), random(50, 16, seed=1).to(dtype).requires_grad_()
    storage, contiguous = torch.zeros(50, 40), torch.zeros(50, 16)
    with mk.use_backend(backend):
        for main_grad in (storage[:, 8:24], contiguous):
            mk.linear_cross_entropy(
                x, weight, targets(30, 50), reduction=reduction, main_grad=main_grad
            ).sum().backward()
    torch.testing.assert_close(storage[:, 8:24], contiguous, rtol=1e-2, atol=1e-2)
    storage[:, 8:24] = 0
    assert torch.equal(storage, torch.zeros(50, 40))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_needs_a_gradient_gets_one(backend: str) -> None:
    x, weight, target = random(8, 16), random(50, 16, seed=1).requires_grad_(), targets(8, 50)
    with mk.use_backend(backend):
        mk.linear_cross_entropy(x, weight, target).backward()
    assert x.grad is None
    assert weight.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("padding", [0, 1, 29])
def test_padding_rows_take_no_part(
    padding: int, reduction: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A padded weight with valid_rows is the slice of it, and NaN in the padding touches nothing."""
    small_chunks(monkeypatch)
    target = targets(41, 67)
    x, weight, bias = random(41, 24), random(67, 24, seed=1), random(67, seed=2)
    rubbish = torch.full((padding, 24), torch.nan)

    def gradients(padded: bool) -> list[Tensor]:
        w, b = (torch.cat([weight, rubbish]), torch.cat([bias, rubbish[:, 0]])) if padded else (weight, bias)
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        main_grad = torch.zeros(w.shape)
        for accumulator in (None, main_grad):
            loss = mk.linear_cross_entropy(
                leaves[0], leaves[1], target, bias=leaves[2], reduction=reduction, valid_rows=67,
                softcap=5.0, label_smoothing=0.1, main_grad=accumulator,
            )  # fmt: skip
            loss.sum().backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None), main_grad]

    with mk.use_backend(backend):
        for ours, theirs in zip(gradients(True), gradients(False), strict=True):
            valid = ours[:67] if ours.shape[:1] == (67 + padding,) else ours
            assert torch.equal(valid, theirs)
            if valid is not ours:
                assert torch.equal(ours[67:], torch.zeros_like(ours[67:]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_twice_gives_the_same_twice(dtype: torch.dtype, backend: str) -> None:
    x, weight = random(30, 16).to(dtype).requires_grad_(), random(50, 16, seed=1).to(dtype).requires_grad_()
    with mk.use_backend(backend):
        loss = mk.linear_cross_entropy(x, weight, targets(30, 50))
        tripled = torch.autograd.grad(loss, (x, weight), torch.tensor(3.0), retain_graph=True)
        plain = torch.autograd.grad(loss, (x, weight), retain_graph=True)
        again = torch.autograd.grad(loss, (x, weight))
    for a, b, c in zip(tripled, plain, again, strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(a, 3 * b)
        assert a.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_workspace_held_touches_no_gradient(dtype: torch.dtype, backend: str) -> None:
    """Rows of logits are padded to 64: with NaN in fresh memory the gradients are what they were without."""
    x, weight = random(30, 16).to(dtype).requires_grad_(), random(50, 16, seed=1).to(dtype).requires_grad_()
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        with mk.use_backend(backend):
            grads = torch.autograd.grad(mk.linear_cross_entropy(x, weight, targets(30, 50)), (x, weight))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)


def test_a_unit_gradient_is_handed_on_without_a_copy() -> None:
    """The fp32 gradient in `.grad` is the very memory that the forward wrote."""
    x, weight = random(30, 16).requires_grad_(), random(50, 16, seed=1).requires_grad_()
    loss = mk.linear_cross_entropy(x, weight, targets(30, 50))
    made = [saved.data_ptr() for saved in loss.grad_fn.saved_tensors[:2]]  # type: ignore[union-attr]
    loss.backward()
    assert [t.grad.data_ptr() for t in (x, weight) if t.grad is not None] == made


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_masks_a_class(backend: str) -> None:
    logits, target = random(4, 2500), torch.tensor([0, 1, 2499, -100])
    logits[0, 1:] = -torch.inf
    logits[1, 2::7] = -torch.inf
    logits[2, :2400] = -torch.inf  # whole blocks before the first finite one
    check(
        lambda x: mk.cross_entropy(x, target, reduction="none"),
        lambda x: plain(x, target, "none"),
        [logits],
        dtype=torch.float32,
        backend=backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("column", [3, 40, 2100])
def test_non_finite_values_do_what_they_do_in_torch(
    column: int, softcap: float | None, value: float, backend: str
) -> None:
    logits, target = random(3, 2500), torch.tensor([40, 41, 42])
    logits[0, column] = value
    logits[2, column], logits[2, column + 300] = value, torch.nan
    with mk.use_backend(backend):
        loss, lse = torch.ops.megalite.cross_entropy_fwd(logits, target, -100, 0.0, 0.0, softcap or 0.0)
    torch.testing.assert_close(loss, plain(logits, target, "none", softcap=softcap), equal_nan=True)
    scores = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(lse, scores.logsumexp(-1), equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_of_a_wider_tensor_need_no_copy(backend: str) -> None:
    leaf, target = random(5, 64).requires_grad_(), targets(5, 50)
    with mk.use_backend(backend):
        strided, copied = (
            mk.cross_entropy(columns, target) for columns in (leaf[:, :50], leaf[:, :50].contiguous())
        )
        assert torch.equal(strided, copied)
        assert torch.equal(*(torch.autograd.grad(loss, leaf)[0] for loss in (strided, copied)))


def test_chunks_come_from_the_device_and_keep_the_workspace_small() -> None:
    assert plan.chunk_rows(4096, 4096, 2) == 1024
    assert plan.chunk_rows(1100, 4096, 2) == 640  # two about equal ones, not 1024 and 76
    assert plan.chunk_rows(100, 4096, 2) == 100
    assert plan.chunk_rows(65536, 262144, 2) == 128
    assert plan.chunk_rows(0, 10, 4) == 1
    h100 = plan.cuda_limits(plan.CUDA_BALANCE[9, 0])
    assert plan.chunk_rows(1 << 20, 128256, 2, h100) in range(1200, 2361)
    assert plan.chunk_rows(1 << 20, 262144, 2, h100) in range(1200, 2049)


def test_inputs_are_not_written() -> None:
    logits, target = random(5, 9).requires_grad_(), targets(5, 9)
    x, weight = random(5, 4).requires_grad_(), random(9, 4).requires_grad_()
    versions = [t._version for t in (logits, target, x, weight)]
    mk.cross_entropy(logits, target).backward()
    mk.linear_cross_entropy(x, weight, target).backward()
    assert [t._version for t in (logits, target, x, weight)] == versions


def test_errors_name_value_and_limit() -> None:
    logits, target = random(4, 9), targets(4, 9)
    with pytest.raises(ValueError, match=r"label_smoothing=1.5 must be between 0.0 and 1.0"):
        mk.cross_entropy(logits, target, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"z_loss=-0.1 must be at least 0"):
        mk.cross_entropy(logits, target, z_loss=-0.1)
    with pytest.raises(ValueError, match=r"softcap=0.0 must be greater than 0"):
        mk.cross_entropy(logits, target, softcap=0.0)
    with pytest.raises(ValueError, match=r"reduction='avg' is not known: use one of 'none', 'sum', 'mean'"):
        mk.cross_entropy(logits, target, reduction="avg")
    with pytest.raises(ValueError, match=r"target has dtype torch.int32: pass int64"):
        mk.cross_entropy(logits, target.int())
    with pytest.raises(ValueError, match=r"target has shape \[3\]"):
        mk.cross_entropy(logits, target[:3])
    with pytest.raises(ValueError, match=r"weight has shape \[9, 8\], but x with 4 features needs \[9, 4\]"):
        mk.linear_cross_entropy(random(4, 4), random(9, 8), target)
    with pytest.raises(ValueError, match=r"main_grad has dtype torch.bfloat16: pass an fp32 accumulator"):
        mk.linear_cross_entropy(random(4, 4), random(9, 4), target, main_grad=random(9, 4).bfloat16())
    with pytest.raises(ValueError, match=r"bias has shape \[4\], but weight with 9 rows needs \[9\]"):
        mk.linear_cross_entropy(random(4, 4), random(9, 4), target, bias=torch.ones(4))
