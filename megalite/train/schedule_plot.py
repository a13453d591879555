"""A pipeline schedule in time, as a picture: what each rank computes when, where it waits, what it keeps.

Colours are those of Okabe and Ito (distinct for every kind of colour blindness); later stages of a rank are lighter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalite.errors import UserError
from megalite.parallel.action_table import Kind
from megalite.parallel.simulate import RankTimeline, Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PASSES: dict[Kind, tuple[str, str]] = {
    "F": ("#0072B2", "forward"),
    "B": ("#D55E00", "backward"),
    "I": ("#E69F00", "gradient of inputs"),
    "W": ("#009E73", "gradient of weights"),
}
"""Colour and name of each kind of action, in the order of the legend."""
INK, MUTED, RULE, IDLE = "#1b2430", "#66707c", "#e3e1da", "#eeece6"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "megalite",  # names inside the SVG, and so the file, are the same at every call
}
LEFT_IN, RIGHT_IN, TOP_IN, BOTTOM_IN = 0.95, 1.5, 1.05, 0.55
ROW_IN, GAP_IN, MEMORY_IN = 0.36, 0.42, 1.35
"""Inches: margins, a rank's row, the gap above the memory lines, and their height."""
MIN_WIDTH_IN, MAX_WIDTH_IN, BOX_IN = 7.0, 30.0, 0.2
"""The time axis is as long as it takes for the shortest action to be BOX_IN wide, within these limits."""
UNDATED: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""Endings of files → what keeps the date out of them, so that one schedule is one file."""
LIGHTEST = 0.45
"""Share of white in the colour of a rank's last stage."""
DIGIT_EM = 0.64
"""Width of a digit of DejaVu Sans in units of the font's size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What the picture says besides the schedule."""

    title: str
    subtitle: str = ""
    time: str = "time"
    memory: str = "micro-batches · stages kept"
    memory_unit: float = 1.0
    """Bytes of one unit on the memory axis."""


def draw_schedule(timeline: Timeline, words: Words) -> Figure:
    """The picture: ranks as rows of boxes that bear micro-batch numbers, memory of each rank below.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing a schedule needs matplotlib: pip install matplotlib") from None
    spans = [span for line in timeline.ranks for span in line.spans]
    shortest = min((span.end - span.start for span in spans if span.end > span.start), default=1.0)
    width = min(MAX_WIDTH_IN, max(MIN_WIDTH_IN, BOX_IN * timeline.makespan / shortest))
    rows_in = ROW_IN * len(timeline.ranks)
    total_in = LEFT_IN + width + RIGHT_IN
    height = TOP_IN + rows_in + GAP_IN + MEMORY_IN + BOTTOM_IN
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(total_in, height), facecolor="white")

        def place(bottom: float, tall: float) -> Axes:
            return figure.add_axes((LEFT_IN / total_in, bottom / height, width / total_in, tall / height))

        rows = place(BOTTOM_IN + MEMORY_IN + GAP_IN, rows_in)
        memory = place(BOTTOM_IN, MEMORY_IN)
        colors = _rank_colors(len(timeline.ranks))
        _draw_rows(rows, timeline, width * 72 / timeline.makespan, colors)
        _draw_memory(memory, timeline, words, colors)
        _draw_head(figure, timeline, words, height)
    return figure


def save_schedule(timeline: Timeline, words: Words, path: Path) -> None:
    """Draw into a file; its ending says the format.

    Raises:
        UserError: another ending than .png, .svg or .pdf, or matplotlib is not installed.
        OSError: it cannot be written.
    """
    kind = path.suffix.lower()
    if kind not in UNDATED:
        raise UserError(f"{path}: a drawing ends in {', '.join(UNDATED)}")
    figure = draw_schedule(timeline, words)
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure.savefig(path, format=kind[1:], dpi=150, metadata=UNDATED[kind])


def _draw_rows(axes: Axes, timeline: Timeline, points_per_second: float, colors: list[str]) -> None:
    from matplotlib.patches import Rectangle

    count = len(timeline.ranks)
    axes.set_xlim(0, timeline.makespan)
    axes.set_ylim(count, 0)
    axes.axis("off")
    for rank, line in enumerate(timeline.ranks):
        axes.add_patch(Rectangle((0, rank + 0.06), timeline.makespan, 0.88, facecolor=IDLE, linewidth=0))
        for start, end in line.waits:
            axes.add_patch(
                Rectangle(
                    (start, rank + 0.06),
                    end - start,
                    0.88,
                    facecolor=IDLE,
                    edgecolor=MUTED,
                    hatch="////",
                    lw=0,
                )
            )
        shades = _shades(timeline, rank)
        for span in line.spans:
            _draw_action(axes, span, rank, shades[span.op.stage], points_per_second)
        _draw_ends(axes, timeline, rank, line, colors[rank])


def _draw_action(axes: Axes, span: Span, row: int, shade: float, points_per_second: float) -> None:
    from matplotlib.patches import Rectangle

    color = _lighter(PASSES[span.op.kind][0], shade)
    length = span.end - span.start
    axes.add_patch(
        Rectangle((span.start, row + 0.06), length, 0.88, facecolor=color, edgecolor="white", linewidth=0.7)
    )
    text = str(span.op.micro_batch)
    size = min(8.5, 0.92 * length * points_per_second / (DIGIT_EM * len(text)))
    if size >= 4.5:
        axes.text(
            (span.start + span.end) / 2,
            row + 0.515,
            text,
            size=size,
            color=_ink_on(color),
            ha="center",
            va="center_baseline",
        )


def _draw_ends(axes: Axes, timeline: Timeline, rank: int, line: RankTimeline, color: str) -> None:
    """The rank's name with the colour of its memory line on the left, its share of idle time on the right."""
    middle = {"xycoords": ("axes fraction", "data"), "va": "center", "textcoords": "offset points"}
    stages = " · ".join(str(s) for s, where in enumerate(timeline.facts.rank_of) if where == rank)
    many = len(timeline.facts.rank_of) > len(timeline.ranks)
    y = rank + 0.5
    axes.annotate("●", (0, y), (-62, 0), color=color, size=9, ha="left", **middle)  # type: ignore[arg-type]
    axes.annotate(f"rank {rank}", (0, y), (-50, 4 if many else 0), size=9, ha="left", **middle)  # type: ignore[arg-type]
    if many:
        axes.annotate(f"stages {stages}", (0, y), (-50, -6), size=6, color=MUTED, ha="left", **middle)  # type: ignore[arg-type]
    idle = f"{timeline.bubble_of(rank):.1%} idle"
    axes.annotate(idle, (1, y), (8, 0), size=8.5, color=MUTED, ha="left", **middle)  # type: ignore[arg-type]


def _draw_memory(axes: Axes, timeline: Timeline, words: Words, colors: list[str]) -> None:
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import ScaledTranslation

    peak = max(line.peak_bytes for line in timeline.ranks) / words.memory_unit
    figure, count = axes.figure, len(timeline.ranks)
    apart = 3 / max(1, count - 1) / 72  # lines at one height stay visible beside each other, within 3 points
    for rank, line in enumerate(timeline.ranks):
        steps = {time: value / words.memory_unit for time, value in line.memory}  # the last at each time
        shift = ScaledTranslation(0, apart * (count - 1 - rank), figure.dpi_scale_trans)
        axes.step(
            [*steps, timeline.makespan], [*steps.values(), 0.0], where="post", color=colors[rank], linewidth=1.4,
            solid_joinstyle="miter", transform=axes.transData + shift, clip_on=False,
        )  # fmt: skip
    axes.set_xlim(0, timeline.makespan)
    axes.set_ylim(0, 1.12 * peak)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=words.memory_unit == 1.0, steps=[1, 2, 4, 5, 10]))
    axes.set_xlabel(words.time, labelpad=6)
    axes.set_title(words.memory, loc="left", size=9, color=MUTED, pad=6)
    for text, rank in _peaks(timeline, words):
        axes.annotate(
            text, (1, timeline.ranks[rank].peak_bytes / words.memory_unit), (8, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", size=8.5, color=MUTED, va="center",
        )  # fmt: skip


def _peaks(timeline: Timeline, words: Words) -> list[tuple[str, int]]:
    """Label and rank of the largest peak, and of the smallest where that is another number."""
    peaks = [line.peak_bytes / words.memory_unit for line in timeline.ranks]
    most, least = max(range(len(peaks)), key=peaks.__getitem__), min(range(len(peaks)), key=peaks.__getitem__)
    if peaks[most] == peaks[least]:
        return [(f"peak {peaks[most]:.4g}, all ranks", most)]
    far = peaks[most] - peaks[least] > 0.12 * peaks[most]
    labels = [
        (f"peak {peaks[most]:.4g}, rank {most}", most),
        (f"peak {peaks[least]:.4g}, rank {least}", least),
    ]
    return labels if far else labels[:1]


def _draw_head(figure: Figure, timeline: Timeline, words: Words, height: float) -> None:
    from matplotlib.patches import Patch

    x = LEFT_IN / figure.get_figwidth()
    kinds = {span.op.kind for line in timeline.ranks for span in line.spans}
    figure.text(x, 1 - 0.22 / height, words.title, size=12, weight="bold", va="center")
    figure.text(x, 1 - 0.46 / height, words.subtitle, size=9, color=MUTED, va="center")
    handles = [Patch(color=color, label=name) for kind, (color, name) in PASSES.items() if kind in kinds]
    handles.append(Patch(facecolor=IDLE, edgecolor=RULE, label="idle"))
    if any(line.waits for line in timeline.ranks):
        handles.append(
            Patch(facecolor=IDLE, edgecolor=MUTED, hatch="////", lw=0, label="waiting for a transfer")
        )
    if len(timeline.facts.rank_of) > len(timeline.ranks):
        handles.append(
            Patch(color=_lighter(PASSES["F"][0], LIGHTEST), label="lighter: a rank's later stages")
        )
    figure.legend(
        handles=handles, loc="center left", bbox_to_anchor=(x, 1 - 0.76 / height), ncols=len(handles), frameon=False,
        borderpad=0, handlelength=1.1, handleheight=1.0, columnspacing=1.6, fontsize=9, borderaxespad=0,
    )  # fmt: skip


def _shades(timeline: Timeline, rank: int) -> dict[int, float]:
    """Stage → how much lighter than its colour it is drawn: the rank's first not at all, its last by LIGHTEST."""
    stages = [stage for stage, where in enumerate(timeline.facts.rank_of) if where == rank]
    return {stage: LIGHTEST * place / max(1, len(stages) - 1) for place, stage in enumerate(stages)}


def _lighter(color: str, share: float) -> str:
    from matplotlib.colors import to_hex, to_rgb

    return to_hex(tuple(part + (1 - part) * share for part in to_rgb(color)))  # type: ignore[arg-type]


def _ink_on(color: str) -> str:
    """White or ink, whichever stands out more (relative luminance of WCAG 2)."""
    from matplotlib.colors import to_rgb

    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(color)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if 1.05 / (luminance + 0.05) > 3.2 else INK


def _rank_colors(count: int) -> list[str]:
    """From dark to light, rank by rank: distinct in grey too."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.85 * rank / max(1, count - 1))) for rank in range(count)]
