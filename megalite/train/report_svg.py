"""One small drawing style for the report's charts: inline SVG, colours that follow the page's theme.

matplotlib draws; its text stays text (the page's font, selectable, sharp at any size) and its colours are
replaced by the page's CSS variables, so one drawing serves light, dark and paper.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from megalite.train.report_records import Floats, RunRecords, Series, si

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "ink": "#1b2430",
    "muted": "#66707c",
    "rule": "#e3e1da",
    "blue": "#2a6fb0",
    "red": "#c8553d",
    "teal": "#2f8f83",
    "amber": "#cf9a2d",
    "plum": "#7b5ea7",
    "gray": "#9aa3ad",
}
"""What matplotlib draws with; each becomes the CSS variable of that name."""

COUNTERS = {"spike": "spikes", "skipped": "skipped"}
"""Field of `Series` that counts each kind of mark."""

WIDTH_IN, HEIGHT_IN = 5.0, 2.75
"""One size for all: 360 × 198 units, so that 9-unit labels stay readable on a 360-pixel screen."""


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of a chart's legend."""

    label: str
    color: str
    shape: str = "line"
    """line, dash, dot, area, tick, spike or skipped."""
    opacity: float = 1.0


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing with its words."""

    title: str
    subtitle: str
    svg: str
    keys: tuple[Key, ...] = field(default=())


# --- style ------------------------------------------------------------------------------------------

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # only for measuring; the page sets its own, narrower one
    "font.size": 9,
    "text.color": COLORS["muted"],
    "axes.edgecolor": COLORS["rule"],
    "axes.labelcolor": COLORS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLORS["rule"],
    "grid.linewidth": 0.7,
    "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.pad": 5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "path.simplify": True,
    "text.parse_math": False,  # a dollar in a source's name is a dollar
}


class Canvas:
    """One chart in the making: axes to draw on, and the SVG at the end."""

    def __init__(
        self, name: str, x_label: str, *, left: float = 0.105, right: float = 0.97, from_zero: bool = True
    ) -> None:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        self.name = name
        self.from_zero = from_zero
        self.figure: Figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN))
        self.axes: Axes = self.figure.add_axes((left, 0.175, right - left, 0.785))
        self.axes.margins(x=0.01)
        self.axes.set_xlabel(x_label, labelpad=4)
        self.axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        self.axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        for axis in (self.axes.xaxis, self.axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))

    def log_y(self) -> None:
        """Logarithmic values, labelled at 1, 2 and 5 where few decades are spanned."""
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        self.axes.set_yscale("log")
        low, high = self.axes.get_ylim()
        narrow = math.log10(high / low) < 2.2
        self.axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if narrow else (1,), numticks=9))
        self.axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
        self.axes.yaxis.set_minor_formatter(NullFormatter())

    def line(self, x: Floats, y: Floats, color: str, **style: Any) -> None:
        """A line; a single point is drawn as a dot."""
        if np.isfinite(y).sum() == 1:
            style = {"marker": "o", "markersize": 4, **style}
        self.axes.plot(x, y, color=COLORS[color], **style)

    def noisy_line(self, x: Floats, series: Series, name: str, color: str) -> None:
        """Smallest to largest value as a pale band, the steps as a pale line, their trend on top."""
        low, high = series.range(name)
        mean = series[name]
        if np.isfinite(mean).sum() < 30:
            self.line(x, mean, color)
            return
        self.axes.fill_between(x, low, high, color=COLORS[color], alpha=0.14, linewidth=0)
        self.axes.plot(x, mean, color=COLORS[color], alpha=0.3, linewidth=0.7)
        self.axes.plot(x, smooth(mean), color=COLORS[color])

    def marks(self, run: RunRecords) -> tuple[Key, ...]:
        """Spikes and skipped steps along the top edge."""
        keys = []
        for kind, symbol, color, label in (
            ("spike", "v", "amber", "spikes"),
            ("skipped", "x", "red", "skipped steps"),
        ):
            at = [tokens for name, _, tokens in run.series.marks if name == kind and math.isfinite(tokens)]
            if at:
                self.axes.plot(
                    at, np.full(len(at), 0.975), symbol, color=COLORS[color], markersize=4.5, clip_on=False,
                    transform=self.axes.get_xaxis_transform(), markeredgewidth=1.2,
                )  # fmt: skip
                keys.append(Key(f"{label} ({getattr(run.series, COUNTERS[kind]):,})", color, kind))
        return tuple(keys)

    def svg(self, label: str) -> str:
        """The drawing as an ``<svg>`` element without size, ready to stand in a page among others."""
        if self.from_zero:
            right = self.axes.get_xlim()[1]
            self.axes.set_xlim(-0.005 * right, right)
        buffer = io.StringIO()
        hide = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with warnings.catch_warnings():
            # The browser draws the text with its own fonts: what DejaVu Sans lacks doesn't matter.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            self.figure.savefig(buffer, format="svg", transparent=True, metadata=hide)
        text = buffer.getvalue()
        return inline_svg(text[text.index("<svg") :], self.name, label)


def inline_svg(svg: str, name: str, label: str) -> str:
    """Make a matplotlib SVG fit to be one of several in a page: own ids, theme colours, a spoken label."""
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for color, value in COLORS.items():
        svg = svg.replace(value, f"var(--{color})")
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    svg = svg[svg.index(">") + 1 :]
    head = f'<svg viewBox="{box[1]}" role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg">'
    return head + re.sub(r"\n\s*", "\n", svg).strip()


def smooth(values: Floats, share: float = 0.03) -> Floats:
    """Moving average of the moving median over `share` of the values: a lone spike leaves no bump.

    Windows shrink towards both ends and stay centred, so that a steep beginning isn't flattened. nan
    counts as absent, and stays where it stands.
    """
    half = min(max(1, round(len(values) * share / 2)), (len(values) - 1) // 2)
    if half < 1:
        return values
    known = np.isfinite(values)
    middle = np.where(known, _windows(np.where(known, values, np.nan), half, np.nanmedian), np.nan)
    return np.where(known, _windows(middle, half, np.nanmean), np.nan)


def _windows(values: Floats, half: int, reduce: Callable[..., Any]) -> Floats:
    """[n] `reduce` over each value and its neighbours within `half` on both sides; nan where all are nan."""
    n = len(values)
    padded = np.pad(values, half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    place, offset = np.arange(n)[:, None], np.abs(np.arange(-half, half + 1))[None, :]
    windows = np.where(offset <= np.minimum(place, n - 1 - place), windows, np.nan)
    out = np.full(n, np.nan)
    some = np.isfinite(windows).any(axis=1)
    out[some] = reduce(windows[some], axis=1)
    return out


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """`positions` moved apart, evenly to both sides, until neighbours are at least `gap` from each other."""
    order = np.argsort(positions)
    placed = np.array(positions, dtype=float)
    for _ in range(200):
        moved = False
        for a, b in itertools.pairwise(order):
            short = gap - (placed[b] - placed[a])
            if short > 1e-9:
                placed[a] -= short / 2
                placed[b] += short / 2
                moved = True
        if not moved:
            break
    return placed.tolist()
