"""The verdict on runs whose state is known: healthy, overfitting, diverging, too short, incomplete."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.train import verdict_signals
from megalite.train.report_records import FIELDS, RunRecords, Series, read_run
from megalite.train.verdict import Signal, Verdict, judge
from tests.helpers.fake_run import Kind, write_fake_run


def verdict_of(folder: Path, kind: Kind, steps: int) -> tuple[Verdict, dict[str, Signal]]:
    verdict = judge(read_run(write_fake_run(folder, kind, steps=steps)))
    return verdict, {signal.name: signal for signal in verdict.signals}


def series(**columns: Any) -> Series:
    """Per-step metrics from columns; what is absent is unknown."""
    length = len(next(iter(columns.values()))) if columns else 0
    columns.setdefault("step", np.arange(1, length + 1))
    mean = np.full((length, len(FIELDS)), np.nan)
    for name, values in columns.items():
        mean[:, FIELDS.index(name)] = values
    loss = np.asarray(columns.get("loss", [np.nan]), dtype=float)
    count = lambda name: int(np.nansum(mean[:, FIELDS.index(name)]))  # noqa: E731
    return Series(
        mean, mean, mean, length, count("skipped"), count("spike"),
        int(np.isnan(loss).sum()), loss[0], loss[-1], (),
    )  # fmt: skip


def run_of(columns: dict[str, Any] | None = None, **records: Any) -> RunRecords:
    return RunRecords(name="made up", series=series(**(columns or {})), **records)


@pytest.mark.parametrize(
    ("kind", "steps", "answer", "expected"),
    [
        (
            "good",
            1200,
            "yes",
            {
                "against xz": "good", "validation trend": "good", "loss still falling": "good",
                "train–validation gap": "good", "loss at the start": "good", "epochs": "good",
                "longest copied run": "good", "update-to-weight ratio": "good", "skipped steps": "good",
            },
        ),
        (
            "overfitting",
            1200,
            "no",
            {
                "validation trend": "bad", "train–validation gap": "bad", "longest copied run": "bad",
                "loss still falling": "good",
            },
        ),
        (
            "diverging",
            600,
            "no",
            {"loss still falling": "bad", "skipped steps": "bad", "gradient norm trend": "bad"},
        ),
        (
            "short",
            8,
            "not yet",
            {"against xz": "watch", "loss still falling": "unknown", "gradient norm trend": "unknown"},
        ),
        ("short", 1, "not yet", {"steady throughput": "unknown"}),
        ("no_evals", 200, "unknown", {"against xz": "unknown", "train–validation gap": "unknown"}),
    ],
)  # fmt: skip
def test_whole_runs(kind: Kind, steps: int, answer: str, expected: dict[str, str], tmp_path: Path):
    verdict, signals = verdict_of(tmp_path, kind, steps)
    assert verdict.answer == answer, verdict.sentence
    assert {name: signals[name].verdict for name in expected} == expected


def test_every_signal_explains_itself(tmp_path: Path):
    verdict, _ = verdict_of(tmp_path, "good", 300)
    for signal in verdict.signals:
        assert signal.reason.endswith("."), signal
        assert signal.reason[0].isupper() or signal.reason[0].isdigit(), signal
        assert signal.value is None or any(c.isdigit() for c in signal.reason), signal
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_a_run_without_any_record_is_unknown():
    verdict = judge(run_of())
    assert verdict.answer == "unknown"
    assert {signal.verdict for signal in verdict.signals} == {"unknown"}


def test_one_skipped_step_at_the_end_is_no_divergence(tmp_path: Path):
    folder = write_fake_run(tmp_path, "good", steps=300)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = {**json.loads(lines[-1]), "loss": None, "grad_norm": None, "skipped": 1}
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    verdict = judge(read_run(folder))
    assert verdict.answer == "yes", verdict.sentence


def test_a_beaten_model_that_has_stopped_learning_is_a_no():
    rng = np.random.default_rng(0)
    evals = [{"step": 200, "tokens": 1e6, "val_loss": 6.0, "val_bits_per_byte": 2.5, "complete": True}]
    run = run_of(
        {"loss": 6 + rng.normal(0, 0.02, 200), "tokens": np.arange(200) * 5e3},
        evals=evals, baselines={"bigram_bits_per_byte": 2.1, "xz_bits_per_byte": 2.6},
    )  # fmt: skip
    verdict = judge(run)
    assert verdict.answer == "no"
    assert verdict.sentence == (
        "No: 2.500 bits per byte does not beat bigram, and the loss has stopped falling."
    )
    falling = run_of(
        {"loss": np.linspace(8, 6, 200), "tokens": np.arange(200) * 5e3},
        evals=evals, baselines=run.baselines,
    )  # fmt: skip
    assert judge(falling).answer == "not yet"


def test_a_winning_run_with_a_bad_signal_is_mixed(tmp_path: Path):
    folder = write_fake_run(tmp_path, "good", steps=600)
    overlap = json.loads((folder / "overlap.json").read_text())
    (folder / "overlap.json").write_text(json.dumps({**overlap, "repetition_rate": 0.9}))
    verdict = judge(read_run(folder))
    assert verdict.answer == "mixed"
    assert verdict.sentence.endswith("yet look at repetition in samples.")


@pytest.mark.parametrize(
    ("bits", "level"), [(1.0, "good"), (1.9, "good"), (1.95, "watch"), (2.0, "watch"), (2.1, "bad")]
)
def test_limits_against_a_baseline(bits: float, level: str):
    run = run_of(
        {"loss": np.full(50, 3.0)},
        evals=[{"val_bits_per_byte": bits}], baselines={"xz_bits_per_byte": 2.0},
    )  # fmt: skip
    signals = {s.name: s for s in verdict_signals.baseline_signals(run, still_falling=False)}
    assert signals["against xz"].verdict == level
    assert signals["against gzip"].verdict == "unknown"


@pytest.mark.parametrize(
    ("signal", "columns", "records", "value", "level"),
    [
        ("epochs", {"tokens": [3e6]}, {"run": {"data": {"train_tokens": 1e6}}}, 3.0, "good"),
        ("epochs", {"tokens": [9e6]}, {"run": {"data": {"train_tokens": 1e6}}}, 9.0, "watch"),
        ("epochs", {"tokens": [3e7]}, {"run": {"data": {"train_tokens": 1e6}}}, 30.0, "bad"),
        ("gap", {"loss": [2.0] * 40}, {"evals": [{"val_loss": 2.1}]}, 0.1, "good"),
        ("gap", {"loss": [2.0] * 40}, {"evals": [{"val_loss": 2.3}]}, 0.3, "watch"),
        ("gap", {"loss": [2.0] * 40}, {"evals": [{"val_loss": 1.5}]}, -0.5, "good"),
        ("start", {"loss": [math.log(4096)]}, {"run": {"model": {"vocab_size": 4096}}}, 0.0, "good"),
        ("start", {"loss": [10.5]}, {"run": {"model": {"vocab_size": 4096}}}, 10.5 - math.log(4096), "bad"),
        ("start", {"loss": [3.0]}, {"run": {"model": {"vocab_size": 4096}}}, 3 - math.log(4096), "good"),
        (
            "repetition",
            {},
            {"overlap": {"repetition_rate": 0.3, "natural_repetition_rate": 0.2}},
            0.3,
            "good",
        ),
        ("repetition", {}, {"overlap": {"repetition_rate": 0.3}}, 0.3, "watch"),
        ("memorisation", {}, {"overlap": {"longest_shared": 20}}, 20, "good"),
        ("memorisation", {}, {"overlap": {"longest_shared": 60, "natural_longest_shared": 50}}, 60, "good"),
        ("memorisation", {}, {"overlap": {"longest_shared": 60, "natural_longest_shared": 20}}, 60, "bad"),
        ("unseen", {}, {"overlap": {"unseen_tokens": 250, "vocab_size": 4096}}, 0.0, "good"),
        ("unseen", {}, {"overlap": {"unseen_tokens": 306, "vocab_size": 1000}}, 0.05, "watch"),
        ("grad_norm", {"grad_norm": [1.0] * 80 + [2.0] * 20}, {}, 2.0, "watch"),
        ("update_ratio", {"update_ratio": [1e-3] * 50}, {}, 1e-3, "good"),
        ("update_ratio", {"update_ratio": [1e-5] * 50}, {}, 1e-5, "bad"),
        ("update_ratio", {"update_ratio": [1e-2] * 50}, {}, 1e-2, "watch"),
        ("spikes", {"spike": [0] * 99 + [1]}, {}, 0.01, "watch"),
        ("skipped", {"skipped": [0] * 999 + [1]}, {}, 0.001, "watch"),
        ("throughput", {"tokens_per_s": [1.0] + [100.0] * 60 + [40.0] * 20}, {}, 0.4, "bad"),
        ("data_wait", {"data_wait_ms": [5.0] * 10, "step_ms": [100.0] * 10}, {}, 0.05, "watch"),
    ],
)
def test_single_signals(
    signal: str, columns: dict[str, Any], records: dict[str, Any], value: float, level: str
):
    got = getattr(verdict_signals, signal)(run_of(columns, **records))
    assert got.value == pytest.approx(value)
    assert got.verdict == level, got.reason


def test_validation_trend_compares_only_the_same_documents():
    evals = [
        {"step": 1, "val_loss": 4.0, "val_tokens": 10},
        {"step": 2, "val_loss": 3.0, "val_tokens": 10},
        {"step": 3, "val_loss": 3.5, "val_tokens": 99, "complete": True},
    ]
    got = verdict_signals.validation_trend(run_of(evals=evals))
    assert got.verdict == "good", "the last one scored other documents: its higher loss means nothing here"
    evals.append({"step": 4, "val_loss": 3.05, "val_tokens": 10})
    assert verdict_signals.validation_trend(run_of(evals=evals)).verdict == "watch"


def test_slope_needs_more_than_noise():
    rng = np.random.default_rng(3)
    flat = verdict_signals.loss_trend(run_of({"loss": 3 + rng.normal(0, 0.05, 400)}))
    assert flat.verdict == "watch"
    falling = verdict_signals.loss_trend(run_of({"loss": np.linspace(4, 3, 400) + rng.normal(0, 0.02, 400)}))
    assert falling.verdict == "good"
    assert falling.value == pytest.approx(-0.2, abs=0.03)
    rising = verdict_signals.loss_trend(run_of({"loss": np.linspace(3, 4, 400) + rng.normal(0, 0.02, 400)}))
    assert rising.verdict == "bad"
