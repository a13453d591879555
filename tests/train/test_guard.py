from __future__ import annotations

import math

import pytest
import torch

from megalite.train.guard import MIN_HISTORY, WINDOW, StepGuard


def make_guard(**options: object) -> StepGuard:
    return StepGuard(torch.device("cpu"), **{"sigma": 6.0, "skip_spikes": False, **options})  # type: ignore[arg-type]


def judge(guard: StepGuard, loss: float, norm: float, norms: list[float] | None = None):
    return guard.judge(torch.tensor(loss), torch.tensor(norm), torch.tensor(norms or [norm]))


@pytest.mark.parametrize(
    ("loss", "norm", "norms", "bad"),
    [
        (math.nan, 1.0, [1.0, 1.0], -1),
        (math.inf, 1.0, [1.0, 1.0], -1),
        (2.0, math.nan, [1.0, math.nan, math.inf], 1),
        (2.0, math.inf, [math.inf, 1.0], 0),
    ],
)
def test_non_finite_steps_are_skipped_and_located(loss, norm, norms, bad):
    guard = make_guard()
    verdict = judge(guard, loss, norm, norms)
    assert verdict.skip
    assert not verdict.spike
    assert verdict.bad_parameter == bad
    assert guard.count == 0, "a skipped step must not enter the history"


def test_consecutive_skips_are_counted_and_end_with_a_good_step():
    guard = make_guard()
    for expected in (1, 2, 3):
        judge(guard, math.nan, 1.0)
        assert guard.consecutive_skips == expected
    assert not judge(guard, 2.0, 1.0).skip
    assert guard.consecutive_skips == 0


def feed(guard: StepGuard, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        noise = torch.randn(2, generator=generator) * 0.1
        judge(guard, 3.0 + noise[0].item(), 1.0 + noise[1].item())


@pytest.mark.parametrize(("loss", "norm"), [(6.0, 1.0), (3.0, 4.0)])
def test_a_spike_in_loss_or_norm_is_reported_but_applied(loss, norm):
    guard = make_guard()
    feed(guard, WINDOW + 20)
    verdict = judge(guard, loss, norm)
    assert verdict.spike
    assert not verdict.skip


def test_spikes_are_skipped_when_asked_for():
    guard = make_guard(skip_spikes=True)
    feed(guard, MIN_HISTORY + 1)
    before = guard.history.clone()
    assert judge(guard, 30.0, 1.0).skip
    assert torch.equal(guard.history, before)


def test_no_spike_before_there_is_a_history():
    guard = make_guard()
    feed(guard, MIN_HISTORY - 1)
    assert not judge(guard, 100.0, 100.0).spike


def test_the_window_forgets_old_steps():
    guard = make_guard()
    for _ in range(WINDOW):
        judge(guard, 100.0, 1.0)
    feed(guard, WINDOW)
    assert judge(guard, 50.0, 1.0).spike


def test_state_survives_a_round_trip():
    guard, other = make_guard(), make_guard()
    feed(guard, 40)
    judge(guard, math.nan, 1.0)
    other.load_state({name: value.clone() for name, value in guard.state().items()})
    for loss in (3.1, 9.0, math.nan):
        a, b = judge(guard, loss, 1.0), judge(other, loss, 1.0)
        assert (a.skip, a.spike, a.bad_parameter) == (b.skip, b.spike, b.bad_parameter)
    assert torch.equal(guard.history, other.history)
