"""The timer: clocks, cold caches, budgets, and the yardsticks."""

from __future__ import annotations

import time

import pytest
import torch

from megalite_kernels import backend
from megalite_kernels.cases import CASES
from megalite_kernels.speed import BOTH, COPY, EAGER, FORWARD, OURS, PRODUCT, measure_case
from megalite_kernels.timing import cache_sweep, copy_bandwidth, copy_of, device_name, measure


def test_a_short_function_is_called_several_times_a_sample() -> None:
    x = torch.ones(4)
    timing = measure({"add": lambda: x.add_(1)}, rounds=5)["add"]
    assert timing.calls > 1
    assert timing.best_ms < 0.5
    assert timing.clock == "process time"
    assert timing.rounds == 5


def test_cold_samples_hold_one_call_and_are_slower() -> None:
    """A vector that fits the second-level cache is read from it when warm, from memory when cold."""
    x = torch.ones(100_000)
    warm = measure({"sum": x.sum}, rounds=9)["sum"]
    cold = measure({"sum": x.sum}, rounds=9, cold=True)["sum"]
    assert cold.calls == 1
    assert cold.median_ms > 1.3 * warm.median_ms


def test_a_budget_ends_the_rounds_but_leaves_three() -> None:
    timing = measure({"sleep": lambda: time.sleep(0.01)}, rounds=1000, budget_s=0.0)["sleep"]
    assert timing.rounds == 3


def test_several_threads_are_timed_by_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    timing = measure({"sleep": lambda: time.sleep(0.002)}, rounds=3)["sleep"]
    assert timing.clock == "wall clock"
    assert timing.best_ms > 1.9


def test_yardsticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "megalite_kernels.timing.last_level_cache_bytes", lambda device: 1 << 24
    )  # not 0.3 GB
    assert "cores)" in device_name()
    assert 1e8 < copy_bandwidth(budget_s=0.0) < 1e12
    cache_sweep()()
    copy_of(64)()


def test_a_case_is_measured_in_both_passes_with_its_yardsticks() -> None:
    case = CASES["gelu"]
    shape = {"T": 64, "F": 128}
    variants = {OURS: case.ours, EAGER: case.baseline()}
    speeds = measure_case(case, shape, torch.float32, variants, rounds=3, cold=False)
    by_key = {(s.variant, s.passes): s for s in speeds}
    assert set(by_key) == {(v, p) for v in (OURS, EAGER, COPY) for p in (FORWARD, BOTH)} | {
        (PRODUCT, FORWARD)
    }
    both = by_key[OURS, BOTH]
    assert both.bytes == (2 + 3) * 64 * 128 * 4
    assert both.gb_per_s == pytest.approx(both.bytes / both.timing.median_ms / 1e6)
    assert both.of_copy == pytest.approx(by_key[COPY, BOTH].timing.median_ms / both.timing.median_ms)
    assert by_key[COPY, FORWARD].of_copy == 1
    assert by_key[PRODUCT, FORWARD].of_gemm <= 1


def test_choices_are_recorded() -> None:
    with backend.use_backend("reference"), backend.recording() as record:
        CASES["gelu"].ours(torch.ones(3))
    assert [(choice.op, choice.backend) for choice in record] == [("activation_fwd", "reference")]
    CASES["gelu"].ours(torch.ones(3))
    assert len(record) == 1
