"""The report's section on where a step's time goes, from the record that ``megalite bench --record RUN`` left."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from megalite.train.report_records import RunRecords, si
from megalite.train.report_sections import section

MINUS = "\N{MINUS SIGN}"


def waterfall(run: RunRecords) -> str:
    """A row for each part, with a bar that hangs where the one before it ends; empty without a record."""
    record = run.waterfall
    parts = [part for part in record.get("parts") or [] if isinstance(part, dict) and part.get("ms")]
    if not parts:
        return ""
    left, rows = 1.0, _row("Peak", 0.0, 1.0, si(1e12 * record["peak_tflops"], unit="FLOP/s"), "100.0", "sum")
    for part in parts:
        share = float(part["share"])
        left -= share
        label = str(part["label"])
        shown = f"{-100 * share:+.1f}".replace("-", MINUS)
        time = f"{part['ms']:,.1f} ms".replace("-", MINUS)
        rows += _row(label[:1].upper() + label[1:], min(left, left + share), abs(share), time, shown)
    reached = float(record["mfu_causal"])
    rows += _row("MFU (causal)", 0.0, reached, f"{record['ideal_ms']:,.1f} ms", f"{100 * reached:.1f}", "sum")
    lead = (
        "From the peak of the machine down to the utilisation that a step reaches, part by part; measured on "
        "steps of their own by the command below. Each loss is a share of the step, and they sum exactly."
    )
    body = (
        f'<div class="card"><table class="terms">{rows}</table><p class="formula">{_words(record)}</p></div>'
    )
    return section("Where a step's time goes", lead, body)


def _row(label: str, start: float, length: float, time: str, points: str, kind: str = "") -> str:
    bar = f'<i style="margin-left:{max(0.0, start):.1%};width:{min(1.0, length):.1%}"></i>'
    cells = f"<td>{escape(label)}</td><td>{bar}</td><td>{escape(time)}</td><td>{points}</td>"
    return f'<tr class="{kind}">{cells}</tr>'


def _words(record: Mapping[str, Any]) -> str:
    peak = (
        f"{si(1e12 * record['peak_tflops'], unit='FLOP/s')} a device ({escape(str(record['peak_source']))})"
    )
    lines = [
        f"{record['tokens_per_s']:,.0f} tokens/s, {record['step_ms_p50']:,.1f} ms a step; peak {peak}.",
        *(escape(str(problem)) + "." for problem in record.get("problems") or ()),
        escape(str(record.get("command", ""))),
    ]
    return "<br>".join(line for line in lines if line)
