"""The report's charts: what is drawn from a run's records, and the words beside each drawing."""

from __future__ import annotations

import math

import numpy as np

from megalite.errors import UserError
from megalite.train.report_records import Floats, RunRecords, Series
from megalite.train.report_svg import COLORS, STYLE, Canvas, Chart, Key, smooth, spread

PHASES = (
    ("forward", "blue", 1.0),
    ("backward", "blue", 0.55),
    ("optimizer", "teal", 1.0),
    ("communication", "plum", 1.0),
    ("data_wait", "amber", 1.0),
    ("other", "gray", 0.6),
)
"""Parts of a step in the order they are stacked, with colour and opacity."""


def elapsed_s(series: Series) -> Floats:
    """[buckets] seconds of training time at the end of each bucket."""
    first, last = series.range("step")
    return np.nancumsum(series["step_ms"] * (last - first + 1)) / 1e3


def phase_means(series: Series) -> dict[str, Floats]:
    """[buckets] milliseconds of each part of the step; ``other`` is what no part accounts for."""
    parts = {name: np.nan_to_num(series[f"{name}_ms"]) for name, _, _ in PHASES if name != "other"}
    whole = np.nan_to_num(series["step_ms"])
    return {**parts, "other": np.maximum(0.0, whole - sum(parts.values()))}


def draw_charts(run: RunRecords) -> list[Chart]:
    """All charts for which the run has numbers, in reading order.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError("the report's charts need matplotlib: pip install matplotlib") from None
    drawers = (
        _loss, _bits, _sources, _learning_rate, _grad_norm, _update_ratio,
        _throughput, _mfu, _step_time, _memory,
    )  # fmt: skip
    with mpl.rc_context(STYLE):
        drawn = [draw(run) for draw in drawers]
    return [chart for chart in drawn if chart is not None]


# --- learning ---------------------------------------------------------------------------------------


def _evals(run: RunRecords, name: str) -> tuple[Floats, Floats]:
    """Tokens and values of the validations that recorded `name`."""
    pairs = [(record.get("tokens"), record.get(name)) for record in run.evals]
    known = [(x, y) for x, y in pairs if isinstance(x, (int, float)) and isinstance(y, (int, float))]
    points = np.array(known, dtype=float).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _robust_top(values: Floats, floor: float) -> float:
    """An upper limit that keeps the curve readable when a few values are far above it."""
    known = values[np.isfinite(values)]
    if not known.size:
        return floor
    return max(floor, float(min(known.max(), np.percentile(known, 99) * 1.5)))


def _loss(run: RunRecords) -> Chart | None:
    series = run.series
    x, y = _evals(run, "val_loss")
    has_train = len(series) > 0 and series.known("loss")
    if not has_train and not x.size:
        return None
    canvas = Canvas("loss", "training tokens")
    keys: list[Key] = []
    if has_train:
        canvas.noisy_line(series["tokens"], series, "loss", "blue")
        keys.append(Key("training", "blue"))
    if x.size:
        canvas.line(x, y, "red", marker="o", markersize=3.2)
        keys.append(Key("validation", "red", "dot"))
    values = np.concatenate((series["loss"], y))
    low, top = float(np.nanmin(values)), _robust_top(values, 0.0)
    canvas.axes.set_ylim(low - 0.06 * (top - low) - 1e-3, top + 0.04 * (top - low) + 1e-3)
    keys += canvas.marks(run)
    return Chart("Loss", "nats per token", canvas.svg("Loss against training tokens"), tuple(keys))


def _bits(run: RunRecords) -> Chart | None:
    x, y = _evals(run, "val_bits_per_byte")
    names = ("unigram", "bigram", "gzip", "xz")
    lines = {name: run.baselines.get(f"{name}_bits_per_byte") for name in names}
    known = {name: float(value) for name, value in lines.items() if isinstance(value, (int, float))}
    if not x.size:
        return None
    canvas = Canvas("bits", "training tokens", right=0.82)
    right = max(run.tokens if math.isfinite(run.tokens) else 0.0, float(x.max()))
    canvas.axes.set_xlim(-0.01 * right, right * 1.01 or 1)
    canvas.line(x, y, "red", marker="o", markersize=3.2)
    top = max(
        [*known.values(), float(y[-1]), min(float(y.max()), 1.15 * max(known.values(), default=math.inf))]
    )
    canvas.axes.set_ylim(0, top * 1.08)
    ends = [float(y[-1]), *known.values()]
    labels = [f"model {y[-1]:.2f}", *(f"{name} {value:.2f}" for name, value in known.items())]
    colors = ["red", *("muted" for _ in known)]
    for value in known.values():
        canvas.axes.axhline(value, color=COLORS["muted"], linewidth=0.9, linestyle=(0, (3, 3)), alpha=0.8)
    for label, place, color in zip(labels, spread(ends, top * 1.08 * 0.075), colors, strict=True):
        canvas.axes.annotate(
            label, (1.02, place), xycoords=("axes fraction", "data"), va="center", color=COLORS[color],
            fontweight="bold" if color == "red" else "normal", annotation_clip=False,
        )  # fmt: skip
    keys = (
        Key("model, held-out text", "red", "dot"),
        *((Key("baselines", "muted", "dash"),) if known else ()),
    )
    return Chart(
        "Bits per byte", "held-out text, lower is better", canvas.svg("Bits per byte against tokens"), keys
    )


def _sources(run: RunRecords) -> Chart | None:
    """Bits per byte of each source, worst first, beside what gzip and xz reach on it."""
    sources = run.last_eval.get("sources") or {}
    ours = {name: value.get("bits_per_byte") for name, value in sources.items() if isinstance(value, dict)}
    known = sorted(((v, n) for n, v in ours.items() if isinstance(v, (int, float))), reverse=True)[:10]
    if len(known) < 2:
        return None
    canvas = Canvas("sources", "bits per byte", left=0.27)
    rows = np.arange(len(known))[::-1]
    baselines = run.baselines.get("sources") or {}
    canvas.axes.grid(visible=True, axis="x")
    canvas.axes.grid(visible=False, axis="y")
    for key, color in (("gzip", "gray"), ("xz", "muted")):
        values = [(baselines.get(name) or {}).get(f"{key}_bits_per_byte") for _, name in known]
        points = [(v, row) for v, row in zip(values, rows, strict=True) if isinstance(v, (int, float))]
        if points:
            canvas.axes.plot(*zip(*points, strict=True), "|", color=COLORS[color], markersize=11, mew=2)
    canvas.axes.plot([v for v, _ in known], rows, "o", color=COLORS["red"], markersize=5.5)
    canvas.axes.set_yticks(rows, [_short(name, 16) for _, name in known])
    canvas.axes.set_ylim(-0.6, len(known) - 0.4)
    canvas.axes.set_xlim(0, canvas.axes.get_xlim()[1] * 1.04)
    keys = (Key("model", "red", "dot"), Key("gzip", "gray", "tick"), Key("xz", "muted", "tick"))
    svg = canvas.svg("Bits per byte of each source")
    return Chart("Bits per byte by source", "last validation, hardest first", svg, keys)


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


# --- optimisation -----------------------------------------------------------------------------------


def _learning_rate(run: RunRecords) -> Chart | None:
    series = run.series
    if not series.known("learning_rate"):
        return None
    canvas = Canvas("rate", "training tokens")
    canvas.line(series["tokens"], series["learning_rate"], "teal")
    canvas.axes.set_ylim(0, float(np.nanmax(series["learning_rate"])) * 1.1 or 1)
    return Chart("Learning rate", "the schedule as it was applied", canvas.svg("Learning rate"))


def _grad_norm(run: RunRecords) -> Chart | None:
    series = run.series
    if not series.known("grad_norm"):
        return None
    canvas = Canvas("norm", "training tokens")
    canvas.noisy_line(series["tokens"], series, "grad_norm", "teal")
    values = series["grad_norm"]
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size and positive.max() > 12 * np.median(positive):
        low, high = series.range("grad_norm")
        canvas.axes.set_ylim(
            float(np.nanmin(np.where(low > 0, low, np.nan))) / 1.2, float(np.nanmax(high)) * 1.4
        )
        canvas.log_y()
    else:
        canvas.axes.set_ylim(bottom=0)
    keys = (Key("before clipping", "teal"), *canvas.marks(run))
    return Chart("Gradient norm", "over all parameters", canvas.svg("Gradient norm"), keys)


def _update_ratio(run: RunRecords) -> Chart | None:
    series = run.series
    values = series["update_ratio"]
    known = np.isfinite(values) & (values > 0)
    if not known.any():
        return None
    canvas = Canvas("update", "training tokens")
    low, high = min(float(values[known].min()), 2e-4), max(float(values[known].max()), 5e-3)
    canvas.axes.set_ylim(low / 1.6, high * 1.6)
    canvas.axes.axhspan(2e-4, 5e-3, color=COLORS["teal"], alpha=0.1, linewidth=0)
    canvas.line(series["tokens"][known], values[known], "teal")
    canvas.log_y()
    keys = (Key("matrices", "teal"), Key("healthy, around 1e-3", "teal", "area", 0.25))
    return Chart(
        "Update-to-weight ratio", "‖Δw‖ ÷ ‖w‖ of one step", canvas.svg("Update-to-weight ratio"), keys
    )


# --- machine ----------------------------------------------------------------------------------------


def _time_axis(series: Series) -> tuple[Floats, str]:
    """[buckets] training time and its axis label, in the largest unit that keeps numbers above one."""
    seconds = elapsed_s(series)
    total = float(seconds[-1]) if len(seconds) else 0.0
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if total >= 2 * size:
            return seconds / size, f"{unit} of training"
    return seconds, "seconds of training"


def _throughput(run: RunRecords) -> Chart | None:
    series = run.series
    if not series.known("tokens_per_s"):
        return None
    x, label = _time_axis(series)
    canvas = Canvas("speed", label)
    canvas.noisy_line(x, series, "tokens_per_s", "blue")
    values = series["tokens_per_s"]
    canvas.axes.set_ylim(0, _robust_top(values, float(np.nanmedian(values))) * 1.12)
    median = float(np.nanmedian(values))
    return Chart("Tokens per second", f"median {median:,.0f}", canvas.svg("Tokens per second over time"))


def _mfu(run: RunRecords) -> Chart | None:
    series = run.series
    if not (series.known("mfu_causal") or series.known("mfu_full")):
        return None
    from matplotlib.ticker import PercentFormatter

    x, label = _time_axis(series)
    canvas = Canvas("mfu", label)
    canvas.line(x, smooth(series["mfu_full"]), "blue", alpha=0.55)
    canvas.line(x, smooth(series["mfu_causal"]), "blue")
    top = _robust_top(np.concatenate((series["mfu_full"], series["mfu_causal"])), 1e-3)
    canvas.axes.set_ylim(0, top * 1.15)
    canvas.axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top > 0.05 else 1))
    keys = (Key("full attention counted", "blue", "line", 0.55), Key("causal half counted", "blue"))
    subtitle = "share of the peak named below"
    return Chart("Model FLOPs utilisation", subtitle, canvas.svg("Model FLOPs utilisation over time"), keys)


def _step_time(run: RunRecords) -> Chart | None:
    series = run.series
    if not series.known("step_ms"):
        return None
    x, label = _time_axis(series)
    parts = phase_means(series)
    canvas = Canvas("step", label, from_zero=len(series) > 1)
    bottom = np.zeros(len(series))
    keys = []
    for name, color, opacity in PHASES:
        height = smooth(parts[name], 0.02)
        if not np.nanmax(height) > 0:
            continue
        if len(series) == 1:
            canvas.axes.bar([0], height, bottom=bottom, color=COLORS[color], alpha=opacity, width=0.5)
            canvas.axes.set_xlim(-1, 1)
        else:
            canvas.axes.fill_between(
                x, bottom, bottom + height, color=COLORS[color], alpha=opacity, linewidth=0
            )
        bottom = bottom + height
        keys.append(Key(name.replace("_", " "), color, "area", opacity))
    canvas.axes.set_ylim(0, _robust_top(bottom, 1e-3) * 1.08)
    if len(series) == 1:
        canvas.axes.set_xticks([])
        canvas.axes.set_xlabel("one step")
    subtitle = "milliseconds, stacked"
    return Chart("Where a step's time goes", subtitle, canvas.svg("Parts of the step's time"), tuple(keys))


def _memory(run: RunRecords) -> Chart | None:
    series = run.series
    if not series.known("peak_memory_bytes"):
        return None
    x, label = _time_axis(series)
    canvas = Canvas("memory", label)
    peak = series.range("peak_memory_bytes")[1] / 2**30
    if len(series) > 1:
        canvas.axes.fill_between(x, 0, peak, color=COLORS["plum"], alpha=0.14, linewidth=0)
    canvas.line(x, peak, "plum")
    canvas.axes.set_ylim(0, float(np.nanmax(peak)) * 1.25 or 1)
    of = (run.run.get("machine") or {}).get("memory_bytes")
    share = f" of {of / 2**30:,.0f} on this machine" if isinstance(of, (int, float)) and of > 0 else ""
    title, svg = "Peak memory", canvas.svg("Peak memory over time")
    return Chart(title, f"GiB so far: {np.nanmax(peak):.2f}{share}", svg)
