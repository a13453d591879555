"""A bar chart of training throughput: every contender of every run, under the machine's measured GEMM peak.

`benchmarks/tables.py` draws it; one picture for each device, one panel for each shape and precision.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pictures import save
from benchmarks.records import Record, digest, machine_of, ours_and_peers, throughput

OURS_COLOUR, COMPILED_COLOUR, EAGER_COLOUR = "#d1495b", "#2e4057", "#8d99ae"
COLUMNS = 3
"""Panels in a row."""
FITS = 0.42
"""Of a panel's width: the least bar that its own figures fit into."""
SHARE_FITS = 0.18
"""The same of its share of the peak alone."""


def pictures(results: Path) -> dict[Path, list[Record]]:
    """The picture of each device in a folder's records, and what it shows: runs by the wall clock, if there are any.

    CPUs of one name with other instruction sets are other devices.
    """
    found: dict[Path, list[Record]] = {}
    for record in throughput(results, repeated=True):
        machine = machine_of(record)
        name = re.sub(r"[^a-z0-9]+", "-", f"{machine.device} {machine.isa}".lower()).strip("-")
        found.setdefault(results / f"throughput_{name}.png", []).append(record)
    return {
        path: [record for record in records if record["clock"] == "wall"] or records
        for path, records in found.items()
    }


def as_markdown(results: Path, link: str) -> str:
    """The pictures, for a document; `link` is the folder as the document writes it."""
    return "\n".join(
        f"![Tokens per second of every contender on {device_of(records[0])}]({link}/{path.name})"
        for path, records in pictures(results).items()
    )


def device_of(record: Record) -> str:
    """Its name, with the instruction set of a CPU."""
    machine = machine_of(record)
    return ", ".join(part for part in (machine.device, machine.isa) if part)


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw runs on one device into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    columns = min(COLUMNS, len(records))
    rows = -(-len(records) // columns)
    most = max(len(record["contenders"]) for record in records)
    size = (max(7.5, 0.6 + 5.0 * columns), 0.8 + (1.5 + 0.42 * most) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel, record in zip(axes.flat, records, strict=False):
        draw_panel(panel, record)
    for panel in axes.flat[len(records) :]:
        panel.axis("off")
    last = max(records, key=lambda record: str(record["time"]))
    facts = f"{machine_of(last)} · torch {last['versions']['torch']} · commit {last['commit']} · {last['time'][:10]}"
    figure.suptitle(f"Training throughput, whole steps\n{facts}", fontsize=9, color="#444444")
    colours = {
        "megalite (× the best other)": OURS_COLOUR,
        "others, torch.compile": COMPILED_COLOUR,
        "others, eager": EAGER_COLOUR,
    }
    marks = [Patch(color=colour) for colour in colours.values()]
    figure.legend(marks, list(colours), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    save(figure, path, digest(records), dpi=120)
    plt.close(figure)


def draw_panel(axes: Any, record: Record) -> None:
    """One run: the fastest contender on top, and how many tokens the GEMM peak would make."""
    ours, peers = ours_and_peers(record)
    contenders = sorted([*ours, *peers], key=lambda contender: contender["tokens_per_s"])
    best = peers[0]["tokens_per_s"] if peers else None
    peak = record["gemm_peak_tflops"] * 1e12 / record["flops_per_token_causal"]
    widest = max(peak, contenders[-1]["tokens_per_s"])
    inside = contenders[0]["tokens_per_s"] > FITS * widest
    for row, contender in enumerate(contenders):
        draw_bar(axes, row, contender, best, widest, inside=inside)
    axes.axvline(peak, color="black", lw=1.2, ls=(0, (4, 2)))
    axes.text(peak, len(contenders) - 0.42, "measured GEMM peak ", ha="right", va="bottom", fontsize=8)
    axes.set_yticks(range(len(contenders)), [contender["name"] for contender in contenders], fontsize=8.5)
    for label, contender in zip(axes.get_yticklabels(), contenders, strict=True):
        if contender["kind"] == "ours":
            label.set(color=OURS_COLOUR, weight="bold")
    axes.set(xlim=(0, widest * 1.03), ylim=(-0.6, len(contenders) + 0.15))
    axes.set_xlabel("tokens/s; in %: of the GEMM peak, causal FLOPs", fontsize=8)
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    layout = f" · {record['layout']}" if record.get("layout") else ""
    clock = "" if record["clock"] == "wall" else " · CPU time"
    title = f"{record['preset']} · {record['precision']} · {record['micro_batch_size']} × {record['seq_length']} tokens"
    axes.set_title(title + layout + clock, fontsize=10.5, loc="left")


def draw_bar(
    axes: Any, row: int, contender: Record, best: float | None, widest: float, *, inside: bool
) -> None:
    """One contender: its rate on the left of the bar or beside it, its share of the peak on the right or beside it."""
    mine, rate = contender["kind"] == "ours", contender["tokens_per_s"]
    other = COMPILED_COLOUR if "compile" in contender["name"] else EAGER_COLOUR
    colour = OURS_COLOUR if mine else other
    axes.barh(row, rate, height=0.72, color=colour)
    text = f"{rate:,.0f}" + (f"  ({rate / best:.2f} ×)" if mine and best else "")
    share, gap = f"{100 * contender['gemm_fraction']:.0f} %", widest * 0.012
    style = {"va": "center", "fontsize": 9, "weight": "bold" if mine else "normal"}
    fits = rate > SHARE_FITS * widest
    if fits:
        axes.text(rate - gap, row, share, ha="right", color="white", **style)
    if inside:
        axes.text(gap, row, text, color="white", **style)
    else:
        beside = text if fits else f"{text}   {share}"
        axes.text(rate + gap, row, beside, color=colour if mine else "#333333", **style)
