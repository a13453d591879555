"""The picture of a schedule: everything is in it, readable, and the same at every call."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megalite.errors import UserError
from megalite.parallel.action_table import ENGINE_NAMES, parse_table, schedule_table
from megalite.parallel.simulate import StageBytes, StageTimes, Timeline, simulate
from megalite.train.schedule_plot import PASSES, Words, draw_schedule, save_schedule

WORDS = Words(title="a schedule", subtitle="on paper", time="seconds")


def timeline(schedule: str, pp: int = 4, micro_batches: int = 8, **times: float) -> Timeline:
    stages = 1 if schedule in ("gpipe", "1f1b") else 2
    return simulate(
        schedule_table(schedule, pp, stages, micro_batches), StageTimes.even(pp * stages, **times)
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", sorted(ENGINE_NAMES))
def test_every_action_is_drawn_with_its_micro_batch(schedule):
    drawn = timeline(schedule)
    rows = draw_schedule(drawn, WORDS).axes[0]
    spans = [span for line in drawn.ranks for span in line.spans]
    boxes = [patch for patch in rows.patches if patch.get_linewidth() > 0]
    assert len(boxes) == len(spans)
    for box, span in zip(boxes, spans, strict=True):
        assert (box.get_x(), box.get_width()) == pytest.approx((span.start, span.end - span.start))  # type: ignore[attr-defined]
    numbers = [text for text in rows.texts if text.get_text().isdigit()]
    assert [text.get_text() for text in numbers] == [str(span.op.micro_batch) for span in spans]
    assert min(text.get_fontsize() for text in numbers) >= 8  # readable at 4 ranks with 8 micro-batches


def test_idle_time_transfers_and_memory_are_drawn():
    drawn = timeline("1f1b", send=0.5)
    figure = draw_schedule(drawn, WORDS)
    rows, memory = figure.axes
    waits = [patch for patch in rows.patches if patch.get_hatch()]
    assert len(waits) == sum(len(line.waits) for line in drawn.ranks) > 0
    assert [line.get_ydata().max() for line in memory.lines] == [4, 3, 2, 1]  # type: ignore[union-attr]
    shown = {text.get_text() for text in (*rows.texts, *memory.texts)}
    assert {f"{drawn.bubble_of(0):.1%} idle", "rank 3", "peak 4, rank 0", "peak 1, rank 3"} <= shown
    assert len({line.get_color() for line in memory.lines}) == 4
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["forward", "backward", "idle", "waiting for a transfer"]


def test_numbers_that_do_not_fit_are_left_out():
    """A stage a hundred times faster than another gets boxes too narrow for digits."""
    table = parse_table(["0F0 0B0", "1F0 1B0"])
    drawn = simulate(
        table, StageTimes((1.0, 1e-4), (1.0, 1e-4), (1.0, 1e-4)), StageBytes((2e9, 1e9), (2e9, 1e9))
    )
    figure = draw_schedule(drawn, Words(title="uneven", memory="GB", memory_unit=1e9))
    assert figure.get_figwidth() <= 33
    assert len([text for text in figure.axes[0].texts if text.get_text() == "0"]) == 2
    assert figure.axes[1].lines[0].get_ydata().max() == 2.0  # type: ignore[union-attr]


def test_files(tmp_path: Path):
    drawn = timeline("dualpipev", 2, 4)
    for name in ("a.png", "a.svg", "a.pdf"):
        save_schedule(drawn, WORDS, tmp_path / name)
        save_schedule(drawn, WORDS, tmp_path / f"again-{name}")
        assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes()
    svg = (tmp_path / "a.svg").read_text()
    assert all(color.lower() in svg for color, _ in PASSES.values())
    assert len(re.findall(r"<text", svg)) > sum(len(line.spans) for line in drawn.ranks)
    with pytest.raises(UserError, match=r"a\.jpeg: a drawing ends in \.png, \.svg, \.pdf"):
        save_schedule(drawn, WORDS, tmp_path / "a.jpeg")
    with pytest.raises(OSError, match="No such file"):
        save_schedule(drawn, WORDS, tmp_path / "missing" / "a.png")
