"""Is pre-training helping? One signal at a time, each with its numbers, its limit and its reason.

`judge` is a pure function of what the run recorded; `verdict_signals` holds the signals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from megalite.train import verdict_signals as signals_of
from megalite.train.report_records import RunRecords
from megalite.train.verdict_signals import MIN_STEPS, Signal, number

Answer = Literal["yes", "mixed", "not yet", "no", "unknown"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer for the whole run and what it rests on."""

    answer: Answer
    sentence: str
    signals: tuple[Signal, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "answer": self.answer,
            "sentence": self.sentence,
            "signals": [
                {"name": s.name, "value": s.value, "verdict": s.verdict, "reason": s.reason}
                for s in self.signals
            ],
        }


def judge(run: RunRecords) -> Verdict:
    """Judge a run from its records. Never raises for missing ones: their signals are `unknown`."""
    trend = signals_of.loss_trend(run)
    signals = (
        *signals_of.baseline_signals(run, still_falling=trend.verdict == "good"),
        signals_of.validation_trend(run),
        signals_of.gap(run),
        trend,
        signals_of.start(run),
        signals_of.epochs(run),
        signals_of.repetition(run),
        signals_of.memorisation(run),
        signals_of.unseen(run),
        signals_of.grad_norm(run),
        signals_of.update_ratio(run),
        signals_of.spikes(run),
        signals_of.skipped(run),
        signals_of.throughput(run),
        signals_of.data_wait(run),
    )
    answer, sentence = _conclude(run, {signal.name: signal for signal in signals})
    return Verdict(answer, sentence, signals)


def _conclude(run: RunRecords, by_name: dict[str, Signal]) -> tuple[Answer, str]:
    """The answer and its sentence, from the signals that decide and the others as reservations."""
    bits = number(run.last_eval, "val_bits_per_byte")

    def is_bad(name: str) -> bool:
        return by_name[name].verdict == "bad"

    if run.series.steps and math.isnan(signals_of.tail_mean(run, "loss")):
        return "no", "No: the run ended with a loss that is not a finite number."
    if not run.series.steps:
        return "unknown", "Unknown: no training step is on record yet."
    if is_bad("loss still falling"):
        return "no", f"No: the run is diverging. {by_name['loss still falling'].reason}"
    if is_bad("validation trend"):
        return "no", f"Not any more: the model overfits. {by_name['validation trend'].reason}"
    if math.isnan(bits):
        return "unknown", "Unknown: no validation is on record, and training loss alone cannot tell."
    against = [by_name[f"against {key}"] for key, _ in signals_of.BASELINES]
    known = [signal for signal in against if signal.value is not None]
    if not known:
        return "unknown", "Unknown: no baseline is on record to compare the validation with."
    lost = [signal.name.removeprefix("against ") for signal in known if (signal.value or 0.0) >= 1.0]
    bad = [signal.name for signal in by_name.values() if signal.verdict == "bad" and signal not in against]
    if lost:
        behind = f"{bits:.3f} bits per byte does not beat {_listed(lost)}"
        if run.series.steps < MIN_STEPS:
            return (
                "not yet",
                f"Not yet: {behind}, but it is too early to tell (steps: {run.series.steps}).",
            )
        if by_name["loss still falling"].verdict == "good":
            return "not yet", f"Not yet: {behind}, but the loss is still falling."
        return "no", f"No: {behind}, and the loss has stopped falling."
    beaten = _listed([signal.name.removeprefix("against ") for signal in known])
    best = max(known, key=lambda signal: signal.value or 0.0)
    ahead = 1 - (best.value or 0.0)
    lead = f"{ahead:.0%} under the best of them" if ahead >= 0.01 else "the best of them by less than 1%"
    if bad:
        concerns = _listed(bad)
        return "mixed", f"Yes, but: {bits:.3f} bits per byte beats {beaten} ({lead}), yet look at {concerns}."
    return "yes", f"Yes: {bits:.3f} bits per byte on unseen text beats {beaten}, {lead}."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
