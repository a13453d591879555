"""The signals that `verdict.judge` weighs: one function each, from a run's records to one `Signal`.

Every limit is written in the docstring of the function that applies it, with its source where it has
one; those without are rules of thumb.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megalite.train.report_records import Floats, RunRecords, si

Level = Literal["good", "watch", "bad", "unknown"]

MIN_STEPS = 30
"""Below this, trends over steps are noise."""


@dataclass(frozen=True, slots=True)
class Signal:
    """One thing looked at."""

    name: str
    value: float | None
    """The number judged; None where it is unknown."""
    shown: str
    """The number as a person reads it."""
    verdict: Level
    reason: str
    """One sentence with the numbers and what they mean."""


# --- against simpler predictors ---------------------------------------------------------------------

BASELINES = (
    ("unigram", "counting single tokens"),
    ("bigram", "counting pairs of tokens"),
    ("gzip", "gzip -9 on the same bytes"),
    ("xz", "xz -9 on the same bytes"),
)


def baseline_signals(run: RunRecords, still_falling: bool) -> Iterator[Signal]:
    """Validation bits per byte ÷ each baseline's: good to 0.95, watch to 1 or while too early to tell."""
    bits = number(run.last_eval, "val_bits_per_byte")
    for key, meaning in BASELINES:
        name, baseline = f"against {key}", number(run.baselines, f"{key}_bits_per_byte")
        if math.isnan(bits) or math.isnan(baseline):
            what = "validation" if math.isnan(bits) else "baseline"
            yield _unknown(name, f"No {what} on record, so there is nothing to compare.")
            continue
        ratio = bits / baseline
        level = _level(ratio, 0.95, 1.0)
        if level == "bad" and (still_falling or run.series.steps < MIN_STEPS):
            level = "watch"
        tail = " and still falling" if ratio > 1 and still_falling else ""
        reason = f"{bits:.3f} bits per byte is {_compared(ratio)} {baseline:.3f} from {meaning}{tail}."
        yield Signal(name, ratio, f"{ratio:.2f} ×", level, reason)


def _compared(ratio: float) -> str:
    if abs(1 - ratio) < 0.005:
        return "level with"
    return f"{abs(1 - ratio):.0%} {'below' if ratio < 1 else 'above'}"


# --- learning and overfitting -----------------------------------------------------------------------


def validation_trend(run: RunRecords) -> Signal:
    """Last validation against the best: a rise is overfitting or divergence. Good to 0.5 %, watch to 2 %."""
    name = "validation trend"
    # Validations during training may score fewer documents than the last one: compare like with like.
    groups: dict[Any, list[float]] = {}
    for record in run.evals:
        if math.isfinite(loss := number(record, "val_loss")):
            groups.setdefault(record.get("val_tokens"), []).append(loss)
    losses = max(groups.values(), key=len, default=[])
    if len(losses) < 2:
        return _unknown(name, "Fewer than two validations of the same documents: no trend yet.")
    best, last = min(losses), losses[-1]
    rise = last / best - 1
    if rise <= 0.005:
        reason = f"Validation loss fell from {losses[0]:.3f} to {last:.3f}, at or near its best ({best:.3f})."
    else:
        reason = f"Validation loss is {last:.3f}, {rise:.1%} above its best of {best:.3f}: it turned upwards."
    return Signal(name, rise, f"{rise:+.1%}", _level(rise, 0.005, 0.02), reason)


def gap(run: RunRecords) -> Signal:
    """Validation minus training loss, in nats per token: good to 0.15, watch to 0.4 (rules of thumb)."""
    name = "train–validation gap"
    val, train = number(run.last_eval, "val_loss"), tail_mean(run, "loss")
    if math.isnan(val) or math.isnan(train):
        return _unknown(name, "It needs a validation and a finite training loss.")
    gap = val - train
    level = _level(gap, 0.15, 0.4)
    meaning = {
        "good": "what is learnt carries over to unseen documents",
        "watch": "part of what is learnt stays with the training text, or the two differ in kind",
        "bad": "the model fits its training text far better than unseen text",
    }[level]
    return Signal(
        name, gap, f"{gap:+.3f} nats", level,
        f"Validation loss {val:.3f} against {train:.3f} in the last training steps: {meaning}.",
    )  # fmt: skip


def loss_trend(run: RunRecords) -> Signal:
    """Change of the training loss over the last fifth of the run, against its noise (two standard errors)."""
    name = "loss still falling"
    series = run.series
    if series.steps < MIN_STEPS:
        return _unknown(name, f"A slope needs {MIN_STEPS} steps; this run has {series.steps}.")
    if math.isnan(tail_mean(run, "loss")):
        return Signal(name, None, "not finite", "bad", "The loss is not a finite number at the end.")
    loss = series["loss"]
    tail = loss[-max(10, len(loss) // 5) :]
    tail = tail[np.isfinite(tail)]
    if tail.size < 5:
        return _unknown(name, "Too few finite losses at the end of the run.")
    change, error = _linear_change(tail)
    if change < -2 * error:
        return Signal(
            name, change, f"{change:+.3f} nats", "good",
            f"Over the last fifth of the run the loss fell by {-change:.3f} nats (± {error:.3f}): "
            "it is still learning.",
        )  # fmt: skip
    if change > max(2 * error, 0.02):
        return Signal(
            name, change, f"{change:+.3f} nats", "bad",
            f"Over the last fifth of the run the loss rose by {change:.3f} nats (± {error:.3f}): "
            "lower the learning rate or look for a spike that never healed.",
        )  # fmt: skip
    return Signal(
        name, change, f"{change:+.3f} nats", "watch",
        f"Over the last fifth of the run the loss changed by {change:+.3f} nats, within its noise "
        f"(± {error:.3f}): more of the same training would add little.",
    )  # fmt: skip


def start(run: RunRecords) -> Signal:
    """First loss against ln V, what knowing nothing gets: good within 0.5 nats, watch within 1.5."""
    name = "loss at the start"
    first, vocab = run.series.first_loss, number(run.run.get("model", {}), "vocab_size")
    if not (math.isfinite(first) and vocab > 1):
        return _unknown(name, "The first loss or the vocabulary's size is not on record.")
    uniform = math.log(vocab)
    off = first - uniform
    if off < -1.5:
        return Signal(
            name, off, f"{off:+.2f} nats", "good",
            f"The first loss, {first:.3f}, is far below ln V = {uniform:.3f}: it began from trained weights.",
        )  # fmt: skip
    level = _level(abs(off), 0.5, 1.5)
    meaning = "like a model that knows nothing" if level == "good" else "so the initial weights are off"
    return Signal(
        name, off, f"{off:+.2f} nats", level,
        f"The first loss was {first:.3f}, {abs(off):.2f} nats from ln V = {uniform:.3f}, {meaning}.",
    )  # fmt: skip


# --- data and samples -------------------------------------------------------------------------------


def epochs(run: RunRecords) -> Signal:
    """Passes over the training tokens: good to 4, watch to 16 (Muennighoff et al., arXiv 2305.16264)."""
    name = "epochs"
    size = number(run.run.get("data", {}), "train_tokens")
    if not size > 0 or math.isnan(run.tokens):
        return _unknown(name, "The training set's size is not on record.")
    epochs = run.tokens / size
    level = _level(epochs, 4, 16)
    meaning = {
        "good": "up to about 4 repeats are nearly worth fresh text",
        "watch": "beyond about 4 repeats each one is worth less",
        "bad": "beyond about 16 repeats more passes teach next to nothing new",
    }[level]
    return Signal(
        name, epochs, f"{epochs:.2f}", level,
        f"{si(run.tokens)} tokens were drawn from a training set of {si(size)}: {meaning}.",
    )  # fmt: skip


def repetition(run: RunRecords) -> Signal:
    """Repeated 4-grams in the samples, above held-out text's own: good to +0.15, watch to +0.4."""
    name = "repetition in samples"
    rate, natural = number(run.overlap, "repetition_rate"), number(run.overlap, "natural_repetition_rate")
    if math.isnan(rate):
        return _unknown(name, "No sampled text was analysed.")
    known = not math.isnan(natural)
    excess = rate - (natural if known else 0.05)
    level = _level(excess, 0.15, 0.4)
    against = f"against {natural:.0%} in held-out text" if known else "where ordinary prose has about 5%"
    meaning = "no loops" if level == "good" else "the samples loop"
    reason = f"{rate:.0%} of the samples' 4-grams are repeats, {against}: {meaning}."
    return Signal(name, rate, f"{rate:.0%}", level, reason)


def memorisation(run: RunRecords) -> Signal:
    """Longest run copied from the training text, against held-out text's of that length (at least 16).

    Good to 1.25 times that, watch to 2.5 times.
    """
    name = "longest copied run"
    length, natural = number(run.overlap, "longest_shared"), number(run.overlap, "natural_longest_shared")
    size = number(run.overlap, "sample_tokens")
    if math.isnan(length):
        return _unknown(name, "No sampled text was compared with the training text.")
    known = not math.isnan(natural)
    usual = max(natural if known else 0.0, 16.0)
    level = _level(length, 1.25 * usual, 2.5 * usual)
    against = f"held-out text shares up to {natural:.0f}" if known else "no held-out text was compared"
    meaning = {
        "good": "no more than unseen text of that length has in common with it",
        "watch": "longer than usual, perhaps boilerplate that the data repeats",
        "bad": "training text is being recited",
    }[level]
    of = f" of {size:.0f}" if size > 0 else ""
    return Signal(
        name, length, f"{length:.0f} tokens", level,
        f"The longest run in a sample that stands in the training text is {length:.0f}{of} tokens; "
        f"{against}: {meaning}.",
    )  # fmt: skip


def unseen(run: RunRecords) -> Signal:
    """Vocabulary never met in training, whose embeddings stay as drawn: good to 1 %, watch to 10 %.

    256 entries are left out of account: a byte-level vocabulary holds every single byte, used or not.
    """
    name = "tokens never seen"
    never, vocab = number(run.overlap, "unseen_tokens"), number(run.overlap, "vocab_size")
    if math.isnan(never) or not vocab > 0:
        return _unknown(name, "The training tokens were not counted.")
    share = max(0.0, never - 256) / vocab
    level = _level(share, 0.01, 0.1)
    meaning = {
        "good": "no more than the spare single bytes and a few",
        "watch": "part of the vocabulary is idle",
        "bad": "a vocabulary made for this text would be smaller or better used",
    }[level]
    reason = f"{never:,.0f} of {vocab:,.0f} vocabulary entries never occur in the training text: {meaning}."
    return Signal(name, share, f"{never:,.0f}", level, reason)


# --- optimisation -----------------------------------------------------------------------------------


def grad_norm(run: RunRecords) -> Signal:
    """Median gradient norm at the end against the middle: good to 1.5 ×, watch to 3 × (rules of thumb)."""
    name = "gradient norm trend"
    values = run.series["grad_norm"]
    if run.series.steps < MIN_STEPS or not np.isfinite(values).any():
        return _unknown(name, f"It needs {MIN_STEPS} steps with a finite gradient norm.")
    middle, end = _median(values, 0.3, 0.6), _median(values, 0.9, 1.0)
    if math.isnan(end):
        return Signal(name, None, "not finite", "bad", "The gradient norm is not finite at the end.")
    ratio = end / middle if middle > 0 else math.nan
    if math.isnan(ratio):
        return _unknown(name, "No finite gradient norm in the middle of the run.")
    level = _level(ratio, 1.5, 3)
    meaning = "steady" if level == "good" else "growing: the usual forerunner of spikes and divergence"
    return Signal(
        name, ratio, f"{ratio:.2f} ×", level,
        f"Median gradient norm {end:.3g} at the end against {middle:.3g} in the middle: {meaning}.",
    )  # fmt: skip


def update_ratio(run: RunRecords) -> Signal:
    """Size of an update relative to the weights, mid-run: near 1e-3 is healthy (Karpathy's rule of thumb).

    Good from 2e-4 to 5e-3, watch from 3e-5 to 2e-2.
    """
    name = "update-to-weight ratio"
    values = run.series["update_ratio"]
    if not np.isfinite(values).any():
        return _unknown(name, "No update sizes on record.")
    ratio = _median(values, 0.2, 0.8)
    if math.isnan(ratio):
        ratio = _median(values, 0.0, 1.0)
    level: Level = "good" if 2e-4 <= ratio <= 5e-3 else "watch" if 3e-5 <= ratio <= 2e-2 else "bad"
    meaning = "near the healthy 1e-3"
    if level != "good":
        small = "small: a higher learning rate may learn faster"
        meaning = small if ratio < 1e-3 else "large: the weights churn"
    return Signal(
        name, ratio, si(ratio, 2), level,
        f"An update typically changes the weight matrices by {si(ratio, 2)} of their norm, {meaning}.",
    )  # fmt: skip


def spikes(run: RunRecords) -> Signal:
    """Steps marked as a loss or gradient spike: good to 0.5 %, watch to 3 %."""
    name = "spikes"
    steps, spikes = run.series.steps, run.series.spikes
    if not steps:
        return _unknown(name, "No steps on record.")
    share = spikes / steps
    reason = f"{spikes:,} of {steps:,} steps stood out from the steps before ({share:.2%})."
    return Signal(name, share, f"{spikes:,}", _level(share, 0.005, 0.03), reason)


def skipped(run: RunRecords) -> Signal:
    """Updates skipped for non-finite numbers: good at 0, watch to 1 %."""
    name = "skipped steps"
    steps, skipped = run.series.steps, run.series.skipped
    if not steps:
        return _unknown(name, "No steps on record.")
    share = skipped / steps
    if not skipped:
        return Signal(name, 0.0, "0", "good", f"None of {steps:,} updates was skipped.")
    reason = f"{skipped:,} of {steps:,} updates were skipped ({share:.2%}) because a number was not finite."
    return Signal(name, share, f"{skipped:,}", _level(share, 0.0, 0.01), reason)


# --- machine ----------------------------------------------------------------------------------------


def throughput(run: RunRecords) -> Signal:
    """Slow steps against the usual: 5th percentile ÷ median of tokens/s. Good from 0.8, watch from 0.5."""
    name = "steady throughput"
    values = run.series["tokens_per_s"]
    values = values[np.isfinite(values)][1:]  # the first step allocates and compiles
    if values.size < 5:
        return _unknown(name, "Too few timed steps.")
    median, slow = float(np.median(values)), float(np.percentile(values, 5))
    ratio = slow / median
    level = _level(-ratio, -0.8, -0.5)
    meaning = "steady" if level == "good" else "something else uses this machine, or the steps differ in work"
    reason = f"Slow stretches (5th percentile) ran at {slow:,.0f} tokens/s against {median:,.0f}: {meaning}."
    return Signal(name, ratio, f"{ratio:.0%}", level, reason)


def data_wait(run: RunRecords) -> Signal:
    """Share of the step spent waiting for data: good to 3 %, watch to 10 %."""
    name = "waiting for data"
    wait, step = np.nansum(run.series["data_wait_ms"]), np.nansum(run.series["step_ms"])
    if not step > 0 or not run.series.known("data_wait_ms"):
        return _unknown(name, "No step times on record.")
    share = float(wait / step)
    level = _level(share, 0.03, 0.1)
    meaning = "data keeps up" if level == "good" else "the loader holds training up"
    reason = f"{share:.1%} of the time went to waiting for data: {meaning}."
    return Signal(name, share, f"{share:.1%}", level, reason)


# --- helpers ----------------------------------------------------------------------------------------


def _level(value: float, good: float, watch: float) -> Level:
    """good up to `good`, watch up to `watch`, else bad."""
    return "good" if value <= good else "watch" if value <= watch else "bad"


def _unknown(name: str, why: str) -> Signal:
    return Signal(name, None, "—", "unknown", why)


def number(record: dict[str, Any], key: str) -> float:
    value = record.get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan


def tail_mean(run: RunRecords, name: str) -> float:
    """Mean of a metric over the last twentieth of the run, at least 3 steps; nan if none is finite."""
    values = run.series[name]
    values = values[-max(3, len(values) // 20) :]
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else math.nan


def _median(values: Floats, start: float, stop: float) -> float:
    """Median of the finite values between two shares of the run; nan if there is none."""
    n = len(values)
    part = values[int(start * n) : max(int(stop * n), int(start * n) + 1)]
    part = part[np.isfinite(part)]
    return float(np.median(part)) if part.size else math.nan


def _linear_change(values: Floats) -> tuple[float, float]:
    """Change from first to last of a least-squares line through `values`, and its standard error."""
    x = np.linspace(-0.5, 0.5, values.size)
    slope = float(np.dot(x, values) / np.dot(x, x))
    residual = values - values.mean() - slope * x
    error = math.sqrt(float(np.dot(residual, residual)) / max(1, values.size - 2) / float(np.dot(x, x)))
    return slope, error
