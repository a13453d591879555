"""What ``megalite bench`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megalite.train.waterfall import UNEXPLAINED, Part, Waterfall, agreement_problems
from megalite.train.waterfall_ops import OTHER
from megalite.train.waterfall_run import Bench

TOP_OPS = 8
WIDE = 120
"""Characters from which the table has bars."""


def print_bench(console: Console, result: Bench, facts: Mapping[str, Any]) -> None:
    """Speed, and the waterfall if there is one."""
    low, p50, high = result.step_ms
    layout = " ".join(f"{axis}{size}" for axis, size in facts["layout"].items())
    machine, precision = facts["machine"], facts["precision"]["chosen"]
    threads = "" if machine.get("device") != "cpu" else f", {machine.get('threads')} threads a process"
    mfu = f"{result.mfu_causal:.1%} causal, {result.mfu_full:.1%} full"
    samples = f"{result.measured_steps} samples, {_CLOCKS[result.clock]}"
    lines = (
        ("model", f"{facts['name']}, {result.tokens_per_step:,} tokens a step in samples of {facts['seq_length']}"),
        ("run", f"{precision}, {machine.get('processes', 1)} processes{threads}{', ' + layout if layout else ''}"),
        ("speed", f"{result.tokens_per_s:,.0f} tokens/s · MFU {mfu}"),
        ("step", f"{p50:,.1f} ms (p10 {low:,.1f}, p90 {high:,.1f}; {samples})"),
        ("peak", f"{result.machine.peak_tflops * 1e3:,.1f} GFLOP/s a device, {result.machine.peak_source}"),
    )  # fmt: skip
    for name, text in lines:
        console.print(f"[bold]{name:<7}[/]{text}", soft_wrap=True)
    if result.waterfall is not None:
        _print_waterfall(console, result.waterfall)
        if agreement_problems(result.waterfall):
            vary = f"plain steps vary by {(high - low) / p50:.0%} here (p10 to p90)"
            console.print(f"{vary}: where that is much, more --rounds average it out", soft_wrap=True)


_CLOCKS = {"wall": "wall clock", "process": "CPU time of the process", "events": "events on the GPU"}


def _print_waterfall(console: Console, waterfall: Waterfall) -> None:
    checked = any(part.profiler_ms is not None for part in waterfall.parts)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ["", "lost ms", "% of step", "MFU left", "spent ms", "ideal", "floor"]
    columns += ["profiler", "diff"] if checked else []
    drawn = console.width >= WIDE
    for number, name in enumerate([*columns, *([""] if drawn else [])]):
        table.add_column(name, justify="left" if number in (0, len(columns)) else "right", no_wrap=True)
    empty = [""] * (len(columns) - 4)
    table.add_row("peak", "", "", "100.00", *empty, *([_bar(0.0, 1.0)] if drawn else []), style="bold")
    left = 1.0
    for part in waterfall.parts:
        left -= part.share
        if part.time_ms == 0 and part.ms == 0:
            continue
        row = [part.label, f"{part.ms:,.1f}", f"{100 * part.share:.2f}", f"{100 * left:.2f}", *_spent(part)]
        row += _compared(part) if checked else ()
        table.add_row(*row, *([_bar(left, left + part.share)] if drawn else []))
    share = f"{100 * waterfall.mfu_causal:.2f}"
    row = ["MFU (causal)", f"{waterfall.ideal_ms:,.1f}", share, share, *empty]
    table.add_row(*row, *([_bar(0.0, waterfall.mfu_causal)] if drawn else []), style="bold")
    console.print(table)
    for note in _notes(waterfall):
        console.print(note, style="dim", soft_wrap=True)
    for problem in agreement_problems(waterfall):
        console.print(f"[red]{problem}[/]", soft_wrap=True)


def _bar(low: float, high: float, width: int = 16) -> str:
    """A bar from `low` to `high` of the whole; a thin line for less than a character."""
    a, b = sorted((max(0.0, min(1.0, low)), max(0.0, min(1.0, high))))
    first, last = round(a * width), round(b * width)
    return " " * first + ("█" * (last - first) or ("▏" if b > a else "")).ljust(width - first)


def _spent(part: Part) -> tuple[str, str, str]:
    ideal = f"{part.ideal_ms:,.1f}" if part.ideal_ms else ""
    floor = f"{part.floor_ms:,.1f}" if part.floor_ms is not None else ""
    return f"{part.time_ms:,.1f}", ideal, floor


def _compared(part: Part) -> tuple[str, str]:
    if part.profiler_ms is None or part.key in (UNEXPLAINED, OTHER):
        return "", ""
    return f"{part.profiler_ms:,.1f}", "" if part.difference is None else f"{part.difference:+.1%}"


def _notes(waterfall: Waterfall) -> list[str]:
    done = waterfall.flops_counted / waterfall.flops_model if waterfall.flops_model else 0.0
    copy = f"{waterfall.machine.copy_bytes_per_s / 1e9:.1f} GB/s"
    own = f"{waterfall.clock_ms:.1f} ms of its own steps ({waterfall.clocked_step_ms:,.1f} ms), left out"
    notes = [
        (
            "lost: above the ideal, which is FLOPs / peak (causal convention; padding rows never count, document "
            f"boundaries never shorten it). floor: bytes / speed of a copy ({copy})."
        ),
        f"the clock took {own}. FLOPs seen in ops: {done:.2%} of the formula's.",
    ]
    if waterfall.unknown_ops:
        notes.append(f"ops of no known kind: {', '.join(waterfall.unknown_ops)}")
    slowest = "; ".join(
        f"{row['op']} {row['ms']:,.1f} ms{_rate(row)} ({row['calls']:.0f} calls)"
        for row in waterfall.ops[:TOP_OPS]
    )
    return [*notes, f"slowest ops: {slowest}"]


def _rate(row: Mapping[str, Any]) -> str:
    return f" {row['flops'] / row['ms'] / 1e6:,.0f} GF/s" if row["flops"] and row["ms"] else ""
