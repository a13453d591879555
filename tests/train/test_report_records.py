"""Reading runs: any length in bounded memory, resumed, torn, incomplete."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megalite.train.report_records import FIELDS, read_run, read_series, si
from megalite.train.report_svg import smooth, spread
from tests.helpers.fake_run import write_fake_run, write_lines


def write_steps(path: Path, steps: list[int], losses: list[float | None]) -> Path:
    write_lines(path, [{"step": s, "tokens": 10 * s, "loss": v} for s, v in zip(steps, losses, strict=True)])
    return path


def test_short_runs_are_read_exactly(tmp_path: Path):
    path = write_steps(tmp_path / "m.jsonl", [1, 2, 3], [3.0, None, 1.0])
    series = read_series(path, [])
    np.testing.assert_array_equal(series["loss"], [3.0, np.nan, 1.0])
    assert (series.steps, series.non_finite, series.first_loss, series.last_loss) == (3, 1, 3.0, 1.0)
    assert not series.known("mfu_full")


def test_buckets_keep_mean_and_extremes(tmp_path: Path):
    rng = np.random.default_rng(0)
    losses = rng.normal(3, 0.1, 1003)
    losses[517] = 99.0
    path = write_steps(tmp_path / "m.jsonl", list(range(1, 1004)), losses.tolist())
    series = read_series(path, [], max_buckets=100)
    assert len(series) <= 100
    width = 11
    parts = [losses[i : i + width] for i in range(0, 1003, width)]
    np.testing.assert_allclose(series["loss"], [p.mean() for p in parts])
    low, high = series.range("loss")
    np.testing.assert_allclose(low, [p.min() for p in parts])
    np.testing.assert_allclose(high, [p.max() for p in parts])
    assert series.steps == 1003


def test_a_resumed_run_counts_each_step_once(tmp_path: Path):
    steps = [1, 2, 3, 4, 5, 6, 4, 5, 6, 7]
    losses = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 6.5, 5.5, 4.5, 3.5]
    series = read_series(write_steps(tmp_path / "m.jsonl", steps, losses), [])
    np.testing.assert_array_equal(series["step"], [1, 2, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(series["loss"], [9, 8, 7, 6.5, 5.5, 4.5, 3.5])


def test_marks_of_repeated_steps_are_not_doubled(tmp_path: Path):
    records = [{"step": s, "tokens": s, "loss": 1.0, "spike": int(s == 3)} for s in (1, 2, 3, 4, 2, 3, 4)]
    write_lines(tmp_path / "m.jsonl", records)
    series = read_series(tmp_path / "m.jsonl", [])
    assert series.spikes == 1
    assert series.marks == (("spike", 3.0, 3.0),)


def test_infinite_numbers_do_not_spoil_a_bucket(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "loss": Infinity}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 2.0}\n')
    series = read_series(path, [], max_buckets=1)
    assert series["loss"].tolist() == [2.0]
    assert series.non_finite == 2


def test_lines_that_are_no_records_are_counted(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n[1]\n{"step": 2, "loss": "x"}\n{"step"')
    problems: list[str] = []
    assert read_series(path, problems).steps == 2
    assert problems == ["m.jsonl: 3 lines were unreadable (an interrupted write) and left out."]


def test_memory_does_not_grow_with_the_run(tmp_path: Path):
    def peak_bytes(steps: int) -> int:
        path = tmp_path / f"{steps}.jsonl"
        write_lines(path, [{**dict.fromkeys(FIELDS, 1.25), "step": step} for step in range(1, steps + 1)])
        tracemalloc.start()
        series = read_series(path, [])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (series.steps, len(series)) == (steps, 500)
        return peak

    small, large = peak_bytes(5000), peak_bytes(15_000)
    assert large < small + 400_000, "10,000 more steps of 21 numbers are 1.7 MB as an array and 7 MB as lists"


def test_the_last_complete_validation_counts(tmp_path: Path):
    folder = write_fake_run(tmp_path, "good", steps=40)
    records = [
        {"step": 10, "val_loss": 3.0, "complete": False},
        {"step": 20, "val_loss": 2.0, "complete": True},
        {"step": 20, "val_loss": 1.0, "complete": False},
        {"step": 10, "val_loss": 2.9, "complete": False},
    ]
    write_lines(folder / "evals.jsonl", records)
    run = read_run(folder)
    assert [(r["step"], r["val_loss"]) for r in run.evals] == [(10, 2.9), (20, 2.0)]
    assert run.last_eval["val_loss"] == 2.0


def test_broken_json_files_are_left_out_and_said(tmp_path: Path):
    folder = write_fake_run(tmp_path, "good", steps=5)
    (folder / "baselines.json").write_text("{")
    run = read_run(folder)
    assert run.baselines == {}
    assert "baselines.json is not valid JSON and was left out." in run.problems


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (12_345_678, "12.3M"), (999_999, "1M"), (1000, "1k"), (980, "980"), (0, "0"), (1.5, "1.5"),
        (0.25, "0.25"), (0.0014, "1.4e-3"), (2e-4, "2e-4"), (3.2e12, "3.2T"), (-1500, "-1.5k"),
        (float("nan"), "—"),
    ],
)  # fmt: skip
def test_si(value: float, shown: str):
    assert si(value) == shown


def test_si_with_unit():
    assert si(7.08e6, unit="FLOP") == "7.08 MFLOP"
    assert si(4.1e9, unit="B") == "4.1 GB"
    assert si(4.1e9) == "4.1B"
    assert si(12, unit="B") == "12 B"


def test_smoothing_ignores_a_lone_spike_and_keeps_the_ends():
    values = np.linspace(8, 3, 200)
    spiked = values.copy()
    spiked[100] += 50
    spiked[50] = np.nan
    got = smooth(spiked)
    assert np.nanmax(np.abs(got - values)) < 0.03
    assert np.flatnonzero(np.isnan(got)).tolist() == [50]
    assert (got[0], got[-1]) == (8, 3)
    assert smooth(np.array([1.0])).tolist() == [1.0]
    assert np.isnan(smooth(np.full(50, np.nan))).all()


def test_labels_are_spread_apart_and_keep_their_order():
    got = spread([2.02, 2.12, 2.0, 5.0], gap=0.3)
    order = np.argsort([2.02, 2.12, 2.0, 5.0])
    assert np.all(np.diff(np.array(got)[order]) >= 0.3 - 1e-6)
    assert got[3] == 5.0
