"""The report's HTML: fragments from a run's records, put into ``report_template.html``.

Every text that comes from outside (names, samples, commands, messages) passes through `escape`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from megalite.train import report_sections as sections_of
from megalite.train.report_charts import elapsed_s
from megalite.train.report_records import RunRecords, si
from megalite.train.report_sections import duration, grouped, known, median, percent, section
from megalite.train.report_svg import Chart
from megalite.train.report_waterfall import waterfall
from megalite.train.verdict import Verdict
from megalite.train.verdict_signals import Signal, number

BYTES = "B"
MINUS = "\N{MINUS SIGN}"

GROUPS = (
    ("Against simpler predictors", ("against unigram", "against bigram", "against gzip", "against xz")),
    (
        "Learning",
        ("loss still falling", "validation trend", "train–validation gap", "loss at the start"),
    ),
    (
        "Data and samples",
        ("epochs", "repetition in samples", "longest copied run", "tokens never seen"),
    ),
    ("Optimisation", ("gradient norm trend", "update-to-weight ratio", "spikes", "skipped steps")),
    ("Machine", ("steady throughput", "waiting for data")),
)
"""Order of the signals on the page."""

STATES = {"good": "fine", "watch": "worth a look", "bad": "needs attention", "unknown": "not known"}


def render_page(run: RunRecords, verdict: Verdict, charts: Sequence[Chart]) -> str:
    """The whole page as one string without any reference to another file."""
    sections = (
        _charts(charts),
        sections_of.samples(run),
        sections_of.flops(run),
        waterfall(run),
        sections_of.about(run),
        sections_of.events(run),
        sections_of.config(run),
    )
    template = Template(
        resources.files("megalite.train").joinpath("report_template.html").read_text(encoding="utf-8")
    )
    head, _, rest = verdict.sentence.partition(":")
    return template.substitute(
        title=escape(f"{run.name}: pre-training report"),
        name=escape(run.name),
        answer_class=verdict.answer.replace(" ", "-"),
        answer=f"<b>{escape(head)}.</b> {escape(_sentence(rest))}",
        hero=_tiles(run) + _bars(run),
        signals=_signals(verdict.signals),
        legend="".join(f"<span>{_state(key)}{text}</span>" for key, text in STATES.items()),
        sections="".join(sections),
        footer=_footer(run),
    )


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:]


# --- head -------------------------------------------------------------------------------------------


def _tiles(run: RunRecords) -> str:
    series, facts = run.series, run.run
    rate = median(run, "tokens_per_s")
    parameters = facts.get("parameters") or {}
    epochs = run.tokens / number(facts.get("data") or {}, "train_tokens")
    hours = duration(float(elapsed_s(series)[-1])) if len(series) else "—"
    tiles = (
        ("Tokens per second", grouped(rate), "median over the run"),
        (
            "Model FLOPs utilisation",
            f"{percent(median(run, 'mfu_causal'))}",
            f"causal, or {percent(median(run, 'mfu_full'))} in full",
        ),
        ("Training tokens", si(run.tokens), known(epochs, "{:.2f} passes over the data")),
        ("Parameters", si(number(parameters, "total")), _embedding_note(parameters)),
        ("Training time", hours, f"{series.steps:,} step{'s' * (series.steps != 1)}{_setup(facts)}"),
        ("Peak memory", _gibibytes(run), escape(_device(facts))),
    )
    return '<div class="card tiles">' + "".join(_tile(*tile) for tile in tiles) + "</div>"


def _tile(label: str, shown: str, note: str) -> str:
    return (
        f'<div class="tile"><div class="label">{label}</div><div class="number">{shown}</div>'
        f'<div class="note">{note}</div></div>'
    )


def _setup(facts: Mapping[str, Any]) -> str:
    return known(number(dict(facts), "setup_s"), ", set up in {:.0f} s")


def _embedding_note(parameters: Mapping[str, Any]) -> str:
    return (
        f"{si(number(dict(parameters), 'embedding'))} of them embeddings"
        if parameters.get("embedding")
        else ""
    )


def _gibibytes(run: RunRecords) -> str:
    high = run.series.range("peak_memory_bytes")[1]
    return f"{np.nanmax(high) / 2**30:.2f} GiB" if np.isfinite(high).any() else "—"


def _device(facts: Mapping[str, Any]) -> str:
    machine = facts.get("machine") or {}
    device = str(machine.get("device") or "")
    cpu = str(machine.get("cpu") or "")
    return cpu if device in ("", "cpu") else device


def _bars(run: RunRecords) -> str:
    """Bits per byte of the model and the baselines as bars, best first."""
    rows = [("model", number(run.last_eval, "val_bits_per_byte"))]
    rows += [
        (key, number(run.baselines, f"{key}_bits_per_byte")) for key in ("xz", "bigram", "gzip", "unigram")
    ]
    known = sorted(((value, name) for name, value in rows if math.isfinite(value)), key=lambda row: row[0])
    if not known:
        body = "<p>No validation and no baselines are on record.</p>"
    else:
        size = number(run.last_eval, "val_bytes")
        part = "All held-out text" if run.last_eval.get("complete") else "Held-out text"
        body = f"<p>{part}{f', {si(size, unit=BYTES)}' if math.isfinite(size) else ''}; lower is better</p>"
        longest = known[-1][0]
        body += "".join(_bar(name, value, value / longest) for value, name in known)
    return f'<div class="card bars"><h3>Bits per byte</h3>{body}</div>'


def _bar(name: str, value: float, share: float) -> str:
    us = " us" if name == "model" else ""
    return (
        f'<div class="bar{us}"><span>{name}</span><span><i style="width:{share:.1%}"></i></span>'
        f"<span>{value:.3f}</span></div>"
    )


# --- verdict ----------------------------------------------------------------------------------------


def _signals(signals: Iterable[Signal]) -> str:
    by_name = {signal.name: signal for signal in signals}
    rows = []
    for title, names in GROUPS:
        rows.append(f'<tr class="group"><td colspan="3">{title}</td></tr>')
        rows += [_signal(by_name[name]) for name in names]
    return "".join(rows)


def _signal(signal: Signal) -> str:
    name = escape(signal.name[0].upper() + signal.name[1:])
    shown = escape(signal.shown.replace("-", MINUS))
    reason = re.sub(r"(?<= )-(?=\d+\.\d)", MINUS, escape(signal.reason))
    # A browser may break a line after the hyphen of 1e-3.
    reason = re.sub(r"[\d.]+e-\d+", r'<span class="number-like">\g<0></span>', reason)
    return f"<tr><td>{_state(signal.verdict)}{name}</td><td>{shown}</td><td>{reason}</td></tr>"


def _state(key: str) -> str:
    return f'<span class="state {key}" role="img" aria-label="{STATES[key]}"></span>'


# --- charts and foot ----------------------------------------------------------------------------------


def _charts(charts: Sequence[Chart]) -> str:
    if not charts:
        return ""
    figures = "".join(_figure(chart) for chart in charts)
    lead = "Pale lines are single steps and their extremes; strong lines are moving averages."
    return section("How it went", lead, f'<div class="charts">{figures}</div>')


def _figure(chart: Chart) -> str:
    keys = "".join(
        f'<span class="key" style="--c:var(--{key.color})">'
        f'<i class="{key.shape}" style="opacity:{key.opacity:g}"></i>{escape(key.label)}</span>'
        for key in chart.keys
    )
    return (
        f'<figure class="card"><figcaption><b>{escape(chart.title)}</b>'
        f'<span class="sub">{escape(chart.subtitle)}</span><span class="keys">{keys}</span></figcaption>'
        f"{chart.svg}</figure>"
    )


def _footer(run: RunRecords) -> str:
    version = (run.run.get("versions") or {}).get("megalite")
    made = f"Made by megalite{' ' + escape(str(version)) if version else ''}. Times are UTC."
    if not run.problems:
        return made
    return f"{made}<p class='problems'>{' '.join(escape(problem) for problem in run.problems)}</p>"
