"""A waterfall as a picture: the peak on top, each loss hanging where the one before it ends, the MFU at the bottom.

Colours are those of Okabe and Ito (distinct for every kind of colour blindness), one for each kind of reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalite.errors import UserError
from megalite.train.schedule_plot import INK, MUTED, RULE, STYLE, UNDATED
from megalite.train.waterfall import BUBBLE, DATA, RECOMPUTE
from megalite.train.waterfall_ops import ATTENTION, COMMUNICATION, GEMM, HEAD, HOST, MEMORY, OPTIMIZER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REASONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "arithmetic below the peak": ("#0072B2", (GEMM, ATTENTION, HEAD)),
    "passes over memory": ("#E69F00", (MEMORY, OPTIMIZER)),
    "computed twice": ("#CC79A7", (RECOMPUTE,)),
    "waiting": ("#D55E00", (COMMUNICATION, BUBBLE, DATA)),
    "host": ("#56B4E9", (HOST,)),
}
"""Reason → colour, and the parts (or the beginnings of their names) that it stands for."""
REST, PEAK, REACHED = "#9aa3ad", "#c9c5b8", "#009E73"
WIDTH_IN, ROW_IN, LEFT_IN, RIGHT_IN, TOP_IN, BOTTOM_IN = 11.0, 0.42, 2.7, 2.05, 1.3, 0.62
MINUS = "\N{MINUS SIGN}"
SHOWN = 5e-4
"""Parts below this share of the step are named in one line under the chart."""


def save_waterfall(record: Mapping[str, Any], path: Path) -> None:
    """Draw a record of `waterfall_record.as_record` into a file; its ending says the format.

    Raises:
        UserError: another ending than .png, .svg or .pdf, no waterfall in the record, or matplotlib is missing.
        OSError: it cannot be written.
    """
    kind = path.suffix.lower()
    if kind not in UNDATED:
        raise UserError(f"{path}: a drawing ends in {', '.join(UNDATED)}")
    figure = draw_waterfall(record)
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure.savefig(path, format=kind[1:], dpi=170, metadata=UNDATED[kind])


def draw_waterfall(record: Mapping[str, Any]) -> Figure:
    """The picture of a record.

    Raises:
        UserError: it has no waterfall, or matplotlib is not installed.
    """
    if "parts" not in record:
        raise UserError("there is no waterfall to draw: measure with --explain")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing a waterfall needs matplotlib: pip install matplotlib") from None
    parts = [part for part in record["parts"] if abs(part["share"]) >= SHOWN]
    small = [part for part in record["parts"] if 0 < abs(part["share"]) < SHOWN]
    rows = len(parts) + 2
    height = TOP_IN + rows * ROW_IN + BOTTOM_IN
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, height), facecolor="white")
        across = (WIDTH_IN - LEFT_IN - RIGHT_IN) / WIDTH_IN
        axes = figure.add_axes((LEFT_IN / WIDTH_IN, BOTTOM_IN / height, across, rows * ROW_IN / height))
        _draw_rows(axes, parts, record)
        _draw_head(figure, record, height, parts)
        _draw_foot(figure, small)
    return figure


def _draw_rows(axes: Axes, parts: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> None:
    rows, mfu = len(parts) + 2, 100 * record["mfu_causal"]
    axes.set_xlim(0, 100)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    axes.grid(axis="x", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    peak = f"{record['peak_tflops'] * 1e3:,.0f} GFLOP/s"
    if record["peak_tflops"] >= 10:
        peak = f"{record['peak_tflops']:,.0f} TFLOP/s"
    _row(axes, 0, 0, 100, PEAK, "Peak", "100 %", peak, bold=True)
    left = 100.0
    for number, part in enumerate(parts, 1):
        after = left - 100 * part["share"]
        axes.plot([left, left], [number - 0.69, number - 0.31], color=MUTED, linewidth=0.8, zorder=1)
        sign = MINUS if part["share"] > 0 else "+"
        shown = f"{sign}{100 * abs(part['share']):.1f}"
        label = part["label"][:1].upper() + part["label"][1:]
        _row(
            axes,
            number,
            after,
            left,
            _color(part["key"]),
            label,
            shown,
            f"{part['ms']:,.1f} ms".replace("-", MINUS),
        )
        left = after
    axes.plot([left, left], [rows - 1.69, rows - 1.31], color=MUTED, linewidth=0.8, zorder=1)
    ideal = f"{record['ideal_ms']:,.1f} ms"
    _row(axes, rows - 1, 0, mfu, REACHED, "MFU reached", f"{mfu:.1f} %", ideal, bold=True)


def _row(
    axes: Axes,
    row: int,
    low: float,
    high: float,
    color: str,
    label: str,
    share: str,
    time: str,
    *,
    bold: bool = False,
) -> None:
    from matplotlib.patches import Rectangle

    low, high = min(low, high), max(low, high)
    axes.add_patch(
        Rectangle((low, row - 0.31), max(high - low, 0.15), 0.62, facecolor=color, linewidth=0, zorder=2)
    )
    weight = "bold" if bold else "normal"
    place: dict[str, Any] = {
        "textcoords": "offset points", "va": "center_baseline", "weight": weight, "annotation_clip": False,
    }  # fmt: skip
    axes.annotate(label, (0, row), (-12, 0), ha="right", size=11, **place)
    axes.annotate(share, (100, row), (58, 0), ha="right", size=11, **place)
    place["weight"] = "normal"
    axes.annotate(time, (100, row), (138, 0), ha="right", size=9.5, color=MUTED, **place)


def _color(key: str) -> str:
    for color, keys in REASONS.values():
        if key.startswith(keys):
            return color
    return REST


def _draw_head(
    figure: Figure, record: Mapping[str, Any], height: float, parts: Sequence[Mapping[str, Any]]
) -> None:
    from matplotlib.patches import Patch

    x = 0.35 / WIDTH_IN
    precision = record.get("precision", {}).get("chosen", "")
    title = (
        f"From the peak to {100 * record['mfu_causal']:.1f} % MFU: {record.get('name', '')} in {precision}"
    )
    figure.text(x, 1 - 0.32 / height, title, size=16, weight="bold", va="center", color=INK)
    machine = record.get("machine", {})
    device = machine.get("device", "cpu")
    threads = machine.get("threads", 1)
    where = device
    if device == "cpu":
        where = f"{machine.get('cpu', 'CPU')}, {threads} thread{'s' * (threads != 1)}"
    processes = machine.get("processes", 1)
    many = f" · {processes} processes" if processes > 1 else ""
    subtitle = (
        f"{record['tokens_per_s']:,.0f} tokens/s · {record['step_ms_p50']:,.0f} ms a step of "
        f"{record['tokens_per_step']:,} tokens · {where}{many}"
    )
    figure.text(x, 1 - 0.64 / height, subtitle, size=10.5, color=MUTED, va="center")
    used = {_color(part["key"]) for part in parts}
    handles = [Patch(color=color, label=name) for name, (color, _) in REASONS.items() if color in used]
    handles += [Patch(color=REST, label="not explained")] if REST in used else []
    figure.legend(
        handles=handles, loc="center left", bbox_to_anchor=(x, 1 - 0.96 / height), ncols=len(handles), frameon=False,
        borderpad=0, handlelength=1.0, handleheight=1.0, columnspacing=1.6, fontsize=10, borderaxespad=0,
    )  # fmt: skip
    right = 1 - 0.14 / WIDTH_IN
    figure.text(right, 1 - 0.96 / height, "points · time", size=9.5, color=MUTED, va="center", ha="right")


def _draw_foot(figure: Figure, small: Sequence[Mapping[str, Any]]) -> None:
    text = (
        "each loss is a share of the step, and so of the MFU (causal attention convention); they sum exactly"
    )
    if small:
        text += f"; below {100 * SHOWN:.2f} %: {', '.join(part['label'] for part in small)}"
    figure.text(0.35 / WIDTH_IN, 0.012, text, size=8, color=MUTED, va="bottom")
