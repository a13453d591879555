from __future__ import annotations

import itertools

import pytest

from megalite.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from megalite.optim.schedule import learning_rate


def make(schedule: ScheduleConfig, **train: int) -> RunConfig:
    return RunConfig(
        train=TrainConfig(**{"steps": 100, "seq_length": 8, **train}),
        optimizer=OptimizerConfig(learning_rate=1.0),
        schedule=schedule,
    )


def test_warmup_rises_to_the_peak_and_cosine_ends_on_the_floor():
    config = make(ScheduleConfig(kind="cosine", warmup=10, min_ratio=0.1))
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[9] == 1.0
    assert rates[54] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))


def test_wsd_is_stable_then_falls_linearly():
    config = make(ScheduleConfig(kind="wsd", warmup=10, decay=20, min_ratio=0.0))
    rates = [learning_rate(config, step) for step in range(100)]
    assert set(rates[9:80]) == {1.0}
    assert rates[89] == pytest.approx(0.5)
    assert rates[-1] == 0.0


def test_wsd_stable_part_does_not_depend_on_the_length_of_the_run():
    schedule = ScheduleConfig(kind="wsd", warmup=10, decay=20)
    short, long = make(schedule), make(schedule, steps=1000)
    assert [learning_rate(short, s) for s in range(80)] == [learning_rate(long, s) for s in range(80)]


def test_constant():
    config = make(ScheduleConfig(kind="constant", warmup=0))
    assert {learning_rate(config, step) for step in range(100)} == {1.0}


def test_token_units_follow_the_batch_ramp():
    ramp = {"micro_batch_size": 2, "global_batch_size": 8, "rampup_start": 2, "rampup_steps": 50}
    tokens = make(ScheduleConfig(unit="tokens", warmup=160, min_ratio=0.0), **ramp)
    # 2 samples of 8 tokens a step at first: the peak is reached once 160 tokens are consumed.
    before = [tokens.train.tokens_before(step + 1) for step in range(100)]
    for step, consumed in enumerate(before):
        if consumed <= 160:
            assert learning_rate(tokens, step) == pytest.approx(consumed / 160)
    assert learning_rate(tokens, 99) == pytest.approx(0.0, abs=1e-9)
