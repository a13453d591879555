"""The report's lower sections: samples, FLOPs, what was run, timeline, configuration.

Every text that comes from outside (names, samples, commands, messages) passes through `escape`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timezone
from html import escape
from typing import Any

import numpy as np

from megalite.train.report_records import RunRecords, si
from megalite.train.verdict_signals import number

MAX_MOMENTS = 6
"""Validations whose samples are shown, evenly spread with the first and the last among them."""

MAX_EVENTS = 60
"""Events listed; of more, the first and the last ones."""

MAX_SAMPLE_CHARACTERS = 3000
"""Longest sample shown in full."""


def section(title: str, lead: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p>{lead}</p>{body}</section>"


def samples(run: RunRecords) -> str:
    told = [record for record in run.evals if record.get("samples")]
    if not told:
        return ""
    chosen = sorted({round(i) for i in np.linspace(0, len(told) - 1, min(MAX_MOMENTS, len(told)))})
    body = "".join(_moment(told[i]) for i in reversed(chosen))
    lead = "What the model wrote at its validations, latest first. Grey text is the prompt it was given."
    return section("Samples through training", lead, f"<dl>{body}</dl>")


def _moment(record: Mapping[str, Any]) -> str:
    bits = number(dict(record), "val_bits_per_byte")
    note = f"{si(number(dict(record), 'tokens'))} tokens"
    note += f", {bits:.3f} bits per byte" if math.isfinite(bits) else ""
    texts = "".join(_sample(sample) for sample in record["samples"] if isinstance(sample, dict))
    step = f"Step {number(dict(record), 'step'):,.0f}"
    return f'<div class="moment"><dt>{step}<span>{note}</span></dt><dd class="samples">{texts}</dd></div>'


def _sample(sample: Mapping[str, Any]) -> str:
    prompt, text = str(sample.get("prompt") or ""), str(sample.get("text") or "")
    if len(text) > MAX_SAMPLE_CHARACTERS:
        text = text[:MAX_SAMPLE_CHARACTERS] + " …"
    return f'<pre class="card"><b>{escape(prompt)}</b>{escape(text) or "(nothing)"}</pre>'


def flops(run: RunRecords) -> str:
    facts = run.run
    terms = {k: float(v) for k, v in (facts.get("flops_terms") or {}).items() if isinstance(v, (int, float))}
    if not terms:
        return ""
    full, causal = number(facts, "flops_per_token_full"), number(facts, "flops_per_token_causal")
    full = full if math.isfinite(full) else sum(terms.values())
    rows = "".join(
        f'<tr class="{"half" if "attention_full" in name else ""}"><td>{escape(_term(name))}</td>'
        f'<td><i style="width:{value / max(terms.values()):.1%}"></i></td>'
        f"<td>{flop_count(value)}</td><td>{value / full:.1%}</td></tr>"
        for name, value in terms.items()
    )
    rows += f'<tr class="sum"><td>In full</td><td></td><td>{flop_count(full)}</td><td></td></tr>'
    if math.isfinite(causal):
        rows += f'<tr class="sum"><td>Causal</td><td></td><td>{flop_count(causal)}</td><td></td></tr>'
    lead = (
        "Training FLOPs per token, forward and backward, term by term. The full convention counts every "
        "query against all keys; the causal one counts attention at half."
    )
    formula = f'<p class="formula">{_mfu(run, full, causal)}</p>'
    body = f'<div class="card"><table class="terms">{rows}</table>{formula}</div>'
    return section("How utilisation is counted", lead, body)


def _mfu(run: RunRecords, full: float, causal: float) -> str:
    """The utilisation formula with this run's numbers in it."""
    peak, rate = _peak_tflops(run.run), median(run, "tokens_per_s")
    if math.isnan(peak):
        return "The peak is not on record."
    source = escape(str(run.run.get("peak_source") or "source not on record"))
    shown = si(peak * 1e12, unit="FLOP/s")
    lines = [f"Peak: <b>{shown}</b> ({source})."]
    measured = number(run.run, "gemm_peak_tflops")
    if math.isfinite(measured) and measured != peak:
        lines[0] += f" Matrix products measured here reach {si(measured * 1e12, unit='FLOP/s')}."
    devices = number(run.run.get("machine") or {}, "processes")
    fp8, fp8_peak = _fp8_flops(run.run), number(run.run, "peak_fp8_tflops")
    if fp8:
        lines.append(
            f"{flop_count(fp8)} of each token are multiplied in FP8 and held to its peak, "
            f"{si(fp8_peak * 1e12, unit='FLOP/s')}; below, the peak of both together."
        )
    for label, flops, key in (("causal", causal, "mfu_causal"), ("full", full, "mfu_full")):
        if fp8:
            shown = si(1e12 * flops / (fp8 / fp8_peak + (flops - fp8) / peak), unit="FLOP/s")
        below = f"({devices:.0f} × {shown})" if devices > 1 else shown
        if math.isfinite(flops) and math.isfinite(rate):
            lines.append(
                f"MFU, {label}: {grouped(rate)} tokens/s × {flop_count(flops)} ÷ {below}; "
                f"recorded median <b>{percent(median(run, key))}</b>."
            )
    again = sum((run.run.get("flops_again") or {}).values())
    if again:
        lines.append(
            f"The backward pass makes {flop_count(again)} of each token again (attention in full); counted too, "
            f"HFU, causal: recorded median <b>{percent(median(run, 'hfu_causal'))}</b>."
        )
    return "<br>".join(lines)


def _fp8_flops(facts: Mapping[str, Any]) -> float:
    """FLOPs of a token that the run multiplies in FP8."""
    terms, share = facts.get("flops_terms") or {}, facts.get("flops_fp8_share") or 0.0
    return share * sum(terms.get(name, 0.0) for name in ("attention_qkv", "attention_output", "mlp"))


def about(run: RunRecords) -> str:
    facts, data = run.run, run.run.get("data") or {}
    machine, precision = facts.get("machine") or {}, facts.get("precision") or {}
    left = {
        "Command": facts.get("command"),
        "Commit": facts.get("commit"),
        "Versions": _pairs(facts.get("versions")),
        "Model": _pairs(facts.get("model")),
        "Parameters": _pairs(facts.get("parameters"), grouped=True),
    }
    right = {
        "Machine": _pairs({k: v for k, v in machine.items() if k != "memory_bytes"}),
        "Precision": " – ".join(str(precision[k]) for k in ("chosen", "reason") if precision.get(k)),
        "Data": ", ".join(map(str, data.get("paths") or [])),
        "Training set": _training_set(data),
        "Tokenizer": str(data.get("tokenizer_fingerprint") or "")[:16],
        "Validation": _validation(run),
    }
    if not any((*left.values(), *right.values())):
        return ""
    body = "".join(
        f'<div class="card"><table class="facts">{_facts(side)}</table></div>' for side in (left, right)
    )
    return section("What was run", "Enough to run it again.", f'<div class="pair">{body}</div>')


def _facts(rows: Mapping[str, Any]) -> str:
    return "".join(f"<tr><td>{k}</td><td>{escape(str(v))}</td></tr>" for k, v in rows.items() if v)


def events(run: RunRecords) -> str:
    if not run.events:
        return ""
    chosen = run.events
    if len(chosen) > MAX_EVENTS:
        half = MAX_EVENTS // 2
        gap = {"kind": f"{len(chosen) - 2 * half:,} more", "step": None}
        chosen = [*chosen[:half], gap, *chosen[-half:]]
    rows = "".join(_event(event) for event in chosen)
    lead = "Starts, resumes, checkpoints, spikes and skipped steps in the order they happened."
    return section("Timeline", lead, f'<div class="card wide"><table class="events">{rows}</table></div>')


def _event(event: Mapping[str, Any]) -> str:
    step, moment = event.get("step"), event.get("time")
    shown = f"step {step:,}" if isinstance(step, int) else ""
    when = ""
    if isinstance(moment, (int, float)):
        when = datetime.fromtimestamp(moment, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    hidden = ("step", "kind", "time")
    rest = {k: v for k, v in event.items() if k not in hidden and v is not None and not isinstance(v, dict)}
    kind = escape(str(event.get("kind", "")))
    return f"<tr><td>{shown}</td><td>{kind}</td><td>{when}</td><td>{escape(_pairs(rest))}</td></tr>"


def config(run: RunRecords) -> str:
    if not run.config_text:
        return ""
    body = (
        '<div class="card"><details><summary>Show config.toml</summary>'
        f"<pre>{escape(run.config_text)}</pre></details></div>"
    )
    return section("Configuration", "Fully resolved, as the run read it.", body)


# --- words for numbers ------------------------------------------------------------------------------


def median(run: RunRecords, name: str) -> float:
    values = run.series[name]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else math.nan


def known(value: float, pattern: str) -> str:
    return pattern.format(value) if math.isfinite(value) else ""


def grouped(value: float) -> str:
    return known(value, "{:,.0f}") or "—"


def percent(value: float) -> str:
    return known(value, "{:.1%}") or "—"


def flop_count(value: float) -> str:
    return si(value, unit="FLOP")


def duration(seconds: float) -> str:
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _peak_tflops(facts: Mapping[str, Any]) -> float:
    """The peak that utilisation was counted against: the table's where the device is known, else measured."""
    table = number(dict(facts), "table_peak_tflops")
    return table if math.isfinite(table) else number(dict(facts), "gemm_peak_tflops")


def _term(name: str) -> str:
    if name == "attention_full":
        return "Attention scores and values (causal: half)"
    return name.replace("_", " ").capitalize().replace("qkv", "q, k, v").replace("Mlp", "MLP")


def _training_set(data: Mapping[str, Any]) -> str:
    tokens, size, documents = (
        number(dict(data), f"{k}") for k in ("train_tokens", "train_bytes", "documents")
    )
    parts = (
        f"{si(tokens)} tokens" if math.isfinite(tokens) else "",
        si(size, unit="B") if math.isfinite(size) else "",
        f"{documents:,.0f} documents" if math.isfinite(documents) else "",
        known(number(dict(data), "bytes_per_token"), "{:.2f} bytes per token"),
    )
    return ", ".join(part for part in parts if part)


def _validation(run: RunRecords) -> str:
    last = run.last_eval
    if not last:
        return "none"
    whole = "every held-out document" if last.get("complete") else "a part of the held-out documents"
    return f"{len(run.evals)} times; the last scored {whole}"


def _pairs(values: Any, *, grouped: bool = False) -> str:
    """A mapping as one line of text."""
    if not isinstance(values, Mapping):
        return ""

    def shown(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        return f"{value:,}" if grouped and isinstance(value, int) else str(value)

    return ", ".join(f"{str(k).replace('_', ' ')} {shown(v)}" for k, v in values.items())
