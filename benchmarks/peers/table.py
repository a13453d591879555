"""The comparison for a reader, on standard error."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table


def show(record: dict[str, Any]) -> None:
    """Print a run's contenders, fastest first, and who was left out."""
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 170, highlight=False)
    layout = f", {record['layout']}" if record["layout"] else ""
    title = (
        f"{record['preset']}, {record['precision']}{layout}, {record['tokens_per_step']} tokens a step of "
        f"{record['seq_length']} each, {record['device']}, {record['threads']} thread(s), {record['clock']} time"
    )
    table = Table(title=title, caption=caption(record), title_justify="left", caption_justify="left")
    for name in (
        "contender",
        "tokens/s",
        "× best peer",
        "MFU causal",
        "MFU full",
        "of GEMM peak",
        "step ms p50",
    ):
        table.add_column(name, justify="left" if name == "contender" else "right", no_wrap=True)
    for name in ("p10 - p90", "peak MB", "above state MB", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    peers = [row["tokens_per_s"] for row in record["contenders"] if row["kind"] == "peer"]
    for row in sorted(record["contenders"], key=lambda row: -row["tokens_per_s"]):
        table.add_row(*cells(row, max(peers, default=None)), style="bold" if row["kind"] == "ours" else "")
    console.print(table)
    for skipped in record["skipped"]:
        console.print(f"skipped {skipped['name']}: {skipped['reason']}", markup=False, soft_wrap=True)


def cells(row: dict[str, Any], best_peer: float | None) -> list[str]:
    """One contender's cells."""
    return [
        row["name"],
        f"{row['tokens_per_s']:,.0f}",
        f"{row['tokens_per_s'] / best_peer:.2f}" if best_peer else "",
        f"{row['mfu_causal']:.1%}",
        f"{row['mfu_full']:.1%}",
        f"{row['gemm_fraction']:.1%}",
        f"{row['step_ms_p50']:,.1f}",
        f"{row['step_ms_p10']:,.1f} - {row['step_ms_p90']:,.1f}",
        f"{row['peak_memory_bytes'] / 1e6:,.0f}",
        f"{row['memory_above_state_bytes'] / 1e6:,.0f}",
        f"{row['losses'][-1]:.4f}",
    ]


def caption(record: dict[str, Any]) -> str:
    """Peaks and how much was measured."""
    best = (
        max(record["gemm_shapes"], key=record["gemm_shapes"].get) if record["gemm_shapes"] else "no product"
    )
    steps = record["contenders"][0]["measured_steps"] if record["contenders"] else 0
    return (
        f"GEMM peak {record['gemm_peak_tflops']:.3f} TFLOP/s ({best}), MFU against the {record['peak_source']}; "
        f"{steps} measured steps in {record['rounds']} turns"
    )
