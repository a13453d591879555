"""The losses' kernels, emulated: few threads, and parts of rows so small that every path is taken."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.native.cuda import emulated, emulated_build, runtime
from megalite_kernels.native.cuda.kernels import cross_entropy as kernels
from megalite_kernels.native.cuda.kernels import scaled_copy
from megalite_kernels.ops.cross_entropy_local import cross_entropy_grad, cross_entropy_grad_
from megalite_kernels.reference.cross_entropy import LossOptions, backward, forward
from megalite_kernels.testing import assert_as_accurate
from tests.ops import test_cross_entropy as ops
from tests.ops import test_cross_entropy_local as local
from tests.ops.catalogue import check, random

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "THREADS", 64)
    monkeypatch.setattr(kernels, "KEPT_THREADS", 64)
    monkeypatch.setattr(scaled_copy, "THREADS", 32)
    forget()
    yield
    forget()


def forget() -> None:
    for function in (kernels.forward, kernels.backward, kernels.gradient, scaled_copy.copy):
        function.cache_clear()


class Way(NamedTuple):
    """How a row waits for its sum to be known."""

    arch: int
    part_bytes: int
    shared_limit: int

    def take(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(runtime.EMULATE, str(self.arch))
        monkeypatch.setattr(kernels, "PART_BYTES", self.part_bytes)
        monkeypatch.setattr(runtime, "shared_bytes_limit", lambda device: self.shared_limit)
        kernels.gradient.cache_clear()


WAYS = {
    "kept": Way(80, 1 << 20, 1 << 20),
    "read twice": Way(80, 64, 100),
    "cluster of 2": Way(90, 112, 1 << 20),
    "cluster of 4": Way(90, 64, 1 << 20),
    "cluster of 8": Way(100, 32, 1 << 20),
}
"""At 53 fp32 logits: 14 vectors in two parts of 7; in 4, 4, 4, 2; in seven of 2 and an empty one."""


@pytest.mark.parametrize(
    ("classes", "options", "dtype"),
    [
        *((53, options, torch.float32) for options in ops.OPTIONS),
        *((53, ops.OPTIONS[4], dtype) for dtype in DTYPES[:2]),
        *((3100, options, torch.bfloat16) for options in (ops.OPTIONS[0], ops.OPTIONS[4])),
        (1, ops.OPTIONS[4], torch.float32),
        (7, ops.OPTIONS[0], torch.float16),
    ],
)
def test_accuracy(classes: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Rows that begin and end off the alignment; unrolled turns and single ones; fewer than a vector."""
    target = ops.targets(4, classes)
    check(
        lambda x: mk.cross_entropy(x, target, reduction="none", **options),
        lambda x: ops.plain(x, target, "none", **options),
        [random(4, classes, scale=3)],
        dtype=dtype,
        backend="cuda",
        magnitude=3.0,
        floor=2,
    )


def loss_and_grad(x: Tensor, target: Tensor, scale: Tensor, options: tuple[Any, ...]) -> list[Tensor]:
    """loss, lse and gradient; in float64 from the reference."""
    if x.dtype == torch.float64:
        loss, lse = forward(x, target, LossOptions(*options))
        return [loss, lse, backward(scale.double(), x, target, lse, LossOptions(*options))]
    written = x.clone()
    loss, lse = torch.ops.megalite.cross_entropy_grad_(written, target, scale, *options)
    return [loss, lse, written]


def check_loss_and_grad(x: Tensor, target: Tensor, scale: Tensor, options: tuple[Any, ...]) -> None:
    with mk.use_backend("cuda"):
        ours = loss_and_grad(x, target, scale, options)
    with mk.use_backend("reference"):
        theirs = loss_and_grad(x, target, scale, options)
    truth = loss_and_grad(x.double(), target, scale, options)
    for index, (a, b, c) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert_as_accurate(a, b, c, floor=2, magnitude=3.0 if index < 2 else 0.0, name=f"result {index}")


OPTIONS = [(-100, 0.0, 0.0, 0.0), (-100, 0.1, 0.01, 3.0)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("scale", ["token", "scalar"])
def test_loss_and_gradient_in_one(
    scale: str, options: tuple[Any, ...], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    WAYS[way].take(monkeypatch)
    scales = random(5, seed=3) if scale == "token" else torch.tensor(0.7)
    check_loss_and_grad(random(5, 53, scale=3), ops.targets(5, 53), scales, options)


@pytest.mark.parametrize(
    ("way", "dtype", "classes"),
    [
        ("kept", torch.bfloat16, 2600),
        ("cluster of 4", torch.bfloat16, 107),
        ("read twice", torch.float16, 2600),
    ],
)
def test_loss_and_gradient_of_16_bits(
    way: str, dtype: torch.dtype, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several vectors a thread in each stage of the copy, and more of them than a turn."""
    WAYS[way].take(monkeypatch)
    logits = random(3, classes, scale=3).to(dtype)
    check_loss_and_grad(logits, ops.targets(3, classes), torch.tensor(0.3), OPTIONS[1])


ERRING = """DEVICE float exp2_approx(float value) {
  if (value == 0.0f) return 1.0f;
  const float error = float(__float_as_uint(value) * 2654435761u >> 8) / 8388608.0f - 1.0f;
  const float result = exp2f(value) * (1.0f + error * 2.4e-7f);
  return value < -126.0f ? 0.0f : result;
}"""
"""2^value with a relative error of up to 2^-22, as the instruction's documentation allows; 2^0 is 1."""


def test_an_exponential_as_wrong_as_the_instruction_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator's is exact: with an error planted that GPUs may have, fp32 keeps within its bounds."""
    shutil.copytree(emulated_build.csrc(), tmp_path / "csrc")
    twin = tmp_path / "csrc" / "emulate" / "ptx_ampere.h"
    exact = re.findall(r"^DEVICE float exp2_approx\(.*$", twin.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(exact) == 1
    assert exact[0].rstrip().count("}") == 1  # a function of one line
    twin.write_text(twin.read_text(encoding="utf-8").replace(exact[0], ERRING), encoding="utf-8")
    with emulated_build.using_sources(tmp_path / "csrc"):
        ops.test_a_large_vocabulary_sums_accurately("cuda")
        test_accuracy(53, ops.OPTIONS[0], torch.float32)
        WAYS["kept"].take(monkeypatch)
        check_loss_and_grad(random(5, 53, scale=3), ops.targets(5, 53), torch.tensor(0.7), OPTIONS[0])


@pytest.mark.parametrize("way", WAYS)
def test_only_the_rows_own_columns_are_written(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns 3 to 56 of rows of 60: what is beside them stays, and an ignored row becomes zeros."""
    WAYS[way].take(monkeypatch)
    storage = random(4, 60)
    before = storage.clone()
    with mk.use_backend("cuda"):
        torch.ops.megalite.cross_entropy_grad_(
            storage[:, 3:56], ops.targets(4, 53), torch.tensor(2.0), *OPTIONS[0]
        )
    assert torch.equal(storage[:, :3], before[:, :3])
    assert torch.equal(storage[:, 56:], before[:, 56:])
    assert torch.equal(storage[1, 3:56], torch.zeros(53))
    assert bool((storage[0, 3:56] != before[0, 3:56]).all())


@pytest.mark.parametrize("way", WAYS)
def test_bits_repeat_in_any_order_of_warps(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    WAYS[way].take(monkeypatch)
    logits, target = random(3, 53), ops.targets(3, 53)
    found = []
    for seed in ("0", "5", "11"):
        monkeypatch.setenv(emulated.SEED, seed)
        with mk.use_backend("cuda"):
            found.append(loss_and_grad(logits, target, torch.tensor(0.3), OPTIONS[1]))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_each_logit_is_read_once_and_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the row waits in shared memory; and no bank is asked twice."""
    logits, target = random(2, 64), torch.tensor([3, 60])
    for way in ("kept", "cluster of 4"):
        WAYS[way].take(monkeypatch)
        with mk.use_backend("cuda"), emulated.reporting() as reports:
            torch.ops.megalite.cross_entropy_grad_(logits.clone(), target, torch.tensor(1.0), *OPTIONS[0])
        (report,) = reports
        # Besides, each thread reads the target, its logit and the scale.
        threads = 2 * 64 * (4 if way == "cluster of 4" else 1)
        assert report.global_read_bytes == logits.nbytes + threads * (8 + 4 + 4)
        assert report.global_written_bytes == logits.nbytes + 2 * 8
        assert report.bank_conflicts == 0


def test_rows_go_where_they_fit() -> None:
    """GPT-2's, Llama 3's and Gemma's vocabularies: bytes kept by a block, and the size of the cluster."""
    ampere, hopper = (
        {"shared_limit": 163 << 10, "clusters": False},
        {"shared_limit": 227 << 10, "clusters": True},
    )
    found = {}
    for cols in (32000, 50257, 128256, 262144):
        for element in ("bf16", "float"):
            for name, device in (("sm_80", ampere), ("sm_90", hopper)):
                kernel, kept = kernels.gradient(element, cols, **device)  # type: ignore[arg-type]
                assert kept * kernel.cluster >= cols * kernels.ELEMENTS[element] or not kept
                found[cols, element, name] = (kept >> 10, kernel.cluster)
    assert found[32000, "bf16", "sm_80"] == found[32000, "bf16", "sm_90"] == (62, 1)
    assert found[50257, "bf16", "sm_80"] == (98, 1)
    assert found[50257, "bf16", "sm_90"] == (49, 2)
    assert found[128256, "bf16", "sm_80"] == (0, 1)
    assert found[128256, "bf16", "sm_90"] == (62, 4)
    assert found[262144, "bf16", "sm_90"] == (64, 8)
    assert found[262144, "float", "sm_90"] == (128, 8)
    assert kernels.gradient("float", 600_000, **hopper)[1] == 0  # type: ignore[arg-type]


def test_a_real_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's vocabulary in a cluster of two full blocks."""
    monkeypatch.undo()
    forget()
    monkeypatch.setenv(runtime.EMULATE, "90")
    logits = random(2, 50257, scale=3).bfloat16()
    check_loss_and_grad(logits, torch.tensor([50256, 7]), torch.tensor(0.5), OPTIONS[0])


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_logits_do_not_overflow(offset: float) -> None:
    ops.test_large_logits_do_not_overflow(offset, "cuda")


def test_a_large_vocabulary_sums_accurately() -> None:
    ops.test_a_large_vocabulary_sums_accurately("cuda")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("column", "softcap"), [(3, None), (40, None), (2100, None), (2100, 5.0)])
def test_non_finite_values_do_what_they_do_in_torch(column: int, softcap: float | None, value: float) -> None:
    ops.test_non_finite_values_do_what_they_do_in_torch(column, softcap, value, "cuda")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_in_the_gradient(value: float, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    WAYS[way].take(monkeypatch)
    logits, target = random(3, 53), torch.tensor([40, 41, 42])
    logits[0, 3], logits[2, 50], logits[2, 8] = value, value, torch.nan
    with mk.use_backend("cuda"):
        ours = loss_and_grad(logits, target, torch.tensor(1.0), OPTIONS[0])
    with mk.use_backend("reference"):
        theirs = loss_and_grad(logits, target, torch.tensor(1.0), OPTIONS[0])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_masked_classes_views_ignored_and_empty() -> None:
    ops.test_minus_infinity_masks_a_class("cuda")
    ops.test_columns_of_a_wider_tensor_need_no_copy("cuda")
    ops.test_other_ignore_index_higher_dims_and_empty("cuda")
    for reduction in ("none", "mean"):
        ops.test_nothing_to_learn_gives_zero_loss_and_gradient(reduction, "cuda")


def test_nothing_but_masked_classes() -> None:
    """logsumexp of no finite logit is -inf, and of a shard's none the maximum, as torch has them."""
    logits, target = torch.full((2, 40), -torch.inf), torch.tensor([0, 39])
    with mk.use_backend("cuda"):
        _, lse = torch.ops.megalite.cross_entropy_fwd(logits, target, -100, 0.0, 0.0, 0.0)
        stats = torch.ops.megalite.cross_entropy_local_fwd(logits, target, 0, 40, -100, 0.0, 0.0, 0.0)
    assert torch.equal(lse, torch.full((2,), -torch.inf))
    assert torch.equal(stats[:2], torch.tensor([[-torch.inf] * 2, [0.0] * 2]))


@pytest.mark.parametrize("bad", [-1, 11, 2**40])
def test_targets_out_of_range_give_nan(bad: int) -> None:
    logits, target = random(2, 11), torch.tensor([0, bad])
    with mk.use_backend("cuda"):
        loss = mk.cross_entropy(logits, target, reduction="none")
        again, _ = torch.ops.megalite.cross_entropy_grad_(logits, target, torch.tensor(1.0), *OPTIONS[0])
    assert torch.isnan(loss).tolist() == torch.isnan(again).tolist() == [False, True]


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
    """Shards of many classes, one of a single class, one of padding alone."""
    monkeypatch.setattr(local, "ROWS", 5)
    local.test_accuracy(local.DIVISIONS[division], options, dtype, "cuda", monkeypatch)
    local.test_targets_all_in_another_shard("cuda")
    local.test_nothing_is_lost_where_a_token_has_no_class_or_no_number("cuda")
    local.test_empty("cuda")


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("stride", [53, 64])
def test_padding_columns_and_everything_around_a_row(stride: int, in_place: bool) -> None:
    """Gradients write their own columns only, whether rows begin aligned, alike, or neither."""
    storage = random(5, stride)
    logits, target, lse = storage[:, :50], torch.tensor([0, 48, -100, 49, 17]), torch.full((5,), 4.0)
    expected = storage.clone()
    with mk.use_backend("reference"):
        expected[:, :50] = cross_entropy_grad(logits, target, lse, torch.tensor(2.0), valid_rows=49)
    gradient = cross_entropy_grad_ if in_place else cross_entropy_grad
    with mk.use_backend("cuda"):
        grad = gradient(logits, target, lse, torch.tensor(2.0), valid_rows=49)
    torch.testing.assert_close(grad, expected[:, :50])
    assert torch.equal(storage[:, 50:], expected[:, 50:])
    if in_place:
        torch.testing.assert_close(storage, expected)


@pytest.mark.parametrize(
    ("reduction", "dtype"), [("none", torch.bfloat16), ("mean", torch.float16), ("sum", torch.float32)]
)
def test_linear(reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ops.test_linear(True, reduction, ops.OPTIONS[4], dtype, "cuda", monkeypatch)


def test_linear_adds_into_the_main_gradient_and_repeats() -> None:
    ops.test_linear_adds_into_the_main_gradient("none", "cuda")
    ops.test_backward_twice_gives_the_same_twice(torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 1])
def test_scaled_copy(start: int, dtype: torch.dtype) -> None:
    """Whole blocks and a last one; one that begins off the alignment; nothing."""
    for size in (0, 1, 1537):
        x, scale = random(size + start)[start:], torch.tensor(1 / 3)

        def copied(backend: str) -> Tensor:
            with mk.use_backend(backend):
                result: Tensor = torch.ops.megalite.scaled_copy(x, scale, dtype)  # noqa: B023
            return result

        assert torch.equal(copied("cuda"), copied("reference"))


@pytest.mark.parametrize("function", ["grad_", "local_backward_"])
def test_rows_with_columns_apart_are_refused(function: str) -> None:
    from megalite_kernels.native.cuda import cross_entropy

    call: Callable[..., Any] = getattr(cross_entropy, function)
    with pytest.raises(ValueError, match=r"logits have stride \(1, 4\): pass contiguous rows"):
        call(random(9, 4).t(), torch.zeros(4).long(), torch.zeros(4), torch.zeros(4), 0, 9, 9, *OPTIONS[0])
