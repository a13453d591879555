"""The comparison itself, on outcomes made by hand: each kind of mistake is found, placed and named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megalite.train.verify_compare import EXACT, FLOORS, Check, judge, measure, put_together
from megalite.train.verify_explain import Finding, explain
from megalite.train.verify_run import Answer, Block, Truth
from tests.helpers.outcomes import EMBEDDING, HEAD, NORM, random, the_truth, two_ranks


def compare(answers: list[Answer], truth: Truth, dtype: str = "float64") -> tuple[Check, Finding | None]:
    check = judge(measure(answers, truth), dtype, None)
    return check, explain(check, answers)


def gradient(answer: Answer, name: str) -> Tensor:
    return next(block.values for block in answer.gradients if block.name == name)


def found(spoil: Callable[[list[Answer]], object]) -> Finding:
    """What is said about the right answers after `spoil`."""
    truth = the_truth()
    answers = two_ranks(truth)
    spoil(answers)
    finding = compare(answers, truth)[1]
    assert finding is not None
    return finding


def test_right_answers_are_right() -> None:
    truth = the_truth()
    check, finding = compare(two_ranks(truth), truth)
    assert finding is None
    assert not check.wrong
    assert check.value("loss") == 5.0
    assert check.value("grad norm") == 2.0
    assert all(m.error == 0 for m in check.measures if m.kind == "gradient")
    kinds = [m.kind for m in check.measures]
    assert kinds[:3] == ["token losses", "token losses", "loss"]
    assert [m.name for m in check.measures if m.kind == "gradient"] == [HEAD, NORM, EMBEDDING]
    assert [m.name for m in check.measures if m.kind == "update"] == [EMBEDDING, NORM, HEAD]


@pytest.mark.parametrize(("share", "is_wrong"), [(0.5, False), (2.0, True)])
def test_the_limit_is_a_share_of_the_largest_gradient_of_the_model(share: float, is_wrong: bool) -> None:
    truth = the_truth()
    largest = max(float(g.abs().max()) for g in truth.gradients.values())
    answers = two_ranks(truth)
    for answer in answers:
        gradient(answer, NORM)[1] += share * EXACT * largest
    assert (compare(answers, truth)[1] is not None) is is_wrong


def test_limits_of_the_runs_type_come_from_one_process() -> None:
    truth = the_truth()
    one = two_ranks(truth)
    for answer in one:
        gradient(answer, NORM)[0] += 0.1
    reference = measure(one, truth)
    check = judge(measure(two_ranks(truth), truth), "bf16", reference)
    limits = dict(zip([m.key for m in check.measures], check.limits, strict=True))
    assert limits["gradient", HEAD] == pytest.approx(0.2)  # twice the worst that one process is wrong in
    assert limits["loss", "step 1"] == 5.0 * FLOORS["bf16"]
    strict = judge(measure(two_ranks(truth), truth), "float64", None, exact_sums=False)
    assert strict.limits[-1] == FLOORS["bf16"] * truth.norms[-1]


def test_a_wrong_shard_is_placed() -> None:
    finding = found(lambda answers: gradient(answers[1], HEAD)[1, 2].add_(0.5))
    assert (finding.kind, finding.name, finding.index) == ("gradient", HEAD, (5, 2))
    assert finding.got == pytest.approx(finding.expected + 0.5)
    assert finding.where == "1 of 28 elements wrong: row 5, column 2; wrong on tp rank 1, right on rank 0"
    assert finding.also_wrong == ()
    assert finding.right == 13
    assert not finding.hint


def test_the_first_in_the_order_of_a_step_is_reported() -> None:
    def spoil(answers: list[Answer]) -> None:
        for answer in answers:
            gradient(answer, EMBEDDING)[0] += 1
            gradient(answer, NORM)[0] += 1
            answer.norms[0] = 2.5

    finding = found(spoil)
    assert finding.name == NORM
    assert finding.also_wrong == (EMBEDDING, "grad norm of step 1")


def test_token_losses_come_first() -> None:
    finding = found(lambda answers: [answer.token_losses[1][2:4].add_(1) for answer in answers])
    assert (finding.kind, finding.name) == ("token losses", "micro-batch 1")
    assert "2 of 6 elements wrong: tokens 2-3" in finding.where
    assert finding.lines()[0] == "first wrong: losses of single tokens of micro-batch 1 in float64"


def test_a_missing_shard() -> None:
    def forget(answers: list[Answer]) -> None:
        answers[1].gradients[:] = [block for block in answers[1].gradients if block.name != HEAD]

    finding = found(forget)
    assert finding.name == HEAD
    assert math.isnan(finding.got)
    assert finding.where == "12 of 28 elements wrong: rows 4-6, all columns; no rank holds those elements"


def test_a_missing_tensor() -> None:
    def forget(answers: list[Answer]) -> None:
        for answer in answers:
            answer.gradients[:] = [block for block in answer.gradients if block.name != NORM]

    assert found(forget).where == "all 4 elements wrong; no rank holds it"


def test_a_tensor_that_the_model_does_not_have() -> None:
    extra = Block("layers.9.mlp_norm.weight", (4,), (0,), random(4, seed=8))
    finding = found(lambda answers: answers[0].gradients.append(extra))
    assert finding.name == "layers.9.mlp_norm.weight"
    assert "the model has no such part of shape [4]: it is on rank 0" in finding.where


def test_a_block_beyond_the_end_of_its_tensor() -> None:
    def shift(answers: list[Answer]) -> None:
        place = next(i for i, block in enumerate(answers[1].gradients) if block.name == HEAD)
        moved = dataclasses.replace(answers[1].gradients[place], offset=(5, 0))
        answers[1].gradients[place] = moved

    finding = found(shift)
    assert finding.name == HEAD
    assert "rows 4-6, all columns; no rank holds those elements" in finding.where


def test_parts_of_a_sum_that_nobody_summed() -> None:
    def spoil(answers: list[Answer]) -> None:
        whole = gradient(answers[0], NORM).clone()
        gradient(answers[0], NORM).mul_(0.25)
        gradient(answers[1], NORM).copy_(whole - gradient(answers[0], NORM))

    finding = found(spoil)
    assert finding.name == NORM
    assert "ranks 0-1 hold the same elements with different values" in finding.where
    assert finding.hint == "a missing sum over tp: the ranks' values add up to what is expected"


def test_copies_that_differ_in_the_last_bit() -> None:
    def spoil(answers: list[Answer]) -> None:
        value = gradient(answers[1], NORM)
        value[3] = torch.nextafter(value[3], torch.tensor(9.0, dtype=torch.float64))

    finding = found(spoil)
    assert finding.name == NORM
    assert "different values" in finding.where


@pytest.mark.parametrize(
    ("factor", "hint"),
    [
        (2.0, "counted 2 times: a sum over 2 ranks too many"),
        (0.25, "1/4 of what it should be: a missing sum over 4 ranks, or a mean for a sum"),
        (1.3, "a wrong scale: every wrong element is 1.3 times what it should be"),
        (0.0, "its gradient never arrives"),
    ],
)
def test_a_constant_factor_is_named(factor: float, hint: str) -> None:
    finding = found(lambda answers: [gradient(answer, HEAD).mul_(factor) for answer in answers])
    assert finding.name == HEAD
    assert finding.hint.startswith(hint)
    assert f"looks like: {hint}" in "\n".join(finding.lines())


def test_a_factor_of_the_norm_and_of_the_loss() -> None:
    def spoil(answers: list[Answer]) -> None:
        for answer in answers:
            answer.norms[:] = [2 * norm for norm in answer.norms]

    finding = found(spoil)
    assert (finding.kind, finding.name) == ("grad norm", "step 1")
    assert finding.hint.startswith("counted 2 times")


def test_an_order_that_ranks_do_not_agree_on() -> None:
    def spoil(answers: list[Answer]) -> None:
        values = gradient(answers[0], HEAD)
        values.copy_(values.roll(1, 0))

    finding = found(spoil)
    assert finding.hint == "right values at wrong places: an order or an offset that ranks do not agree on"
    assert "rows 0-3, all columns; wrong on tp rank 0" in finding.where


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_wrong(value: float) -> None:
    def spoil(answers: list[Answer]) -> None:
        gradient(answers[0], HEAD)[0, 0] = value

    finding = found(spoil)
    assert finding.index == (0, 0)
    assert "wrong on tp rank 0, right on rank 1" in finding.where


@pytest.mark.parametrize("kind", ["losses", "norms"])
def test_ranks_that_disagree_in_a_number(kind: str) -> None:
    def spoil(answers: list[Answer]) -> None:
        getattr(answers[1], kind)[0] = math.nextafter(getattr(answers[1], kind)[0], 9)

    finding = found(spoil)
    assert finding.name == "step 1"
    assert math.isinf(finding.error)


def test_a_loss_that_is_not_a_number() -> None:
    finding = found(lambda answers: [answer.losses.__setitem__(0, math.nan) for answer in answers])
    assert finding.kind == "loss"


def test_weights_that_were_never_updated() -> None:
    truth = the_truth()
    answers = two_ranks(truth)
    for answer in answers:
        for block in answer.weights:
            block.values.copy_(truth.initial[block.name][block.index])
    finding = compare(answers, truth)[1]
    assert finding is not None
    assert (finding.kind, finding.name, finding.got) == ("update", EMBEDDING, 0.0)


def test_blocks_are_put_together() -> None:
    whole = random(4, 3, seed=9)
    rows = [(r, Block("x", (4, 3), (r, 0), whole[r : r + 1])) for r in range(3)]
    tail = [(3, Block("x", (4, 3), (3, 0), whole[3:, :2])), (4, Block("x", (4, 3), (3, 2), whole[3:, 2:]))]
    got, disagree = put_together([*rows, *tail], whole.shape)
    assert torch.equal(got, whole)
    assert disagree == ()
    changed = dataclasses.replace(rows[1][1], values=whole[1:2] + 1)
    got, disagree = put_together([*rows, (7, changed), *tail], whole.shape)
    assert torch.equal(got, whole)  # the first one counts
    assert disagree == (1, 7)
