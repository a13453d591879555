"""The record of the pipeline benchmark, from made-up times of two ranks."""

from __future__ import annotations

import pytest

from benchmarks.pipeline_bubble import Arguments, RankTimes, layouts, machine, record_of


def rank_times(rank: int, offset: float) -> RankTimes:
    """F 1 s and B 2 s on one stage, two micro-batches; three steps of 9.5 s, in which a rank is busy for 6."""
    starts = [100.0 * step + offset for step in range(3)]
    return RankTimes(
        passes={(rank, "F"): 1.0, (rank, "B"): 2.0},
        calls={(rank, "F"): 2, (rank, "B"): 2},
        starts=starts,
        ends=[start + 9.5 - offset for start in starts],
        send_s=0.25,
    )


def test_measured_and_simulated_idle_time_are_of_the_same_kind() -> None:
    arguments = Arguments(pp=2, schedules="1f1b", micro_batches=2)
    (layout,) = layouts(arguments)
    record = record_of(arguments, layout, [rank_times(0, 0.0), rank_times(1, 0.5)])
    assert record["step_ms_p50"] == 9500
    assert record["bubble"] == pytest.approx(1 - 6 / 9.5)
    assert record["simulated_step_ms"] == 9500  # 9 without the transfers, of which two are on the way of all
    assert record["simulated_bubble"] == pytest.approx(1 - 6 / 9.5)
    assert record["even_bubble"] == pytest.approx(1 / 3)
    assert machine(layout)["cores"] >= 1


def test_schedules_that_do_not_fit_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    found = [layout.pp_schedule for layout in layouts(Arguments(pp=2, micro_batches=3))]
    assert found == ["gpipe", "1f1b", "looped_bfs", "interleaved", "interleaved_zero_bubble", "zbv"]
    assert "dualpipev left out: " in capsys.readouterr().err
