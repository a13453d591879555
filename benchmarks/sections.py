"""The tables of README, one function each: records in, markdown out. `benchmarks/tables.py` puts them in place."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.cuda_tables import cuda_kernels
from benchmarks.records import (
    KERNELS,
    PIPELINE,
    THROUGHPUT,
    Machine,
    Record,
    machine_of,
    newest,
    ours_and_peers,
    read,
    throughput,
)

MAKERS = {
    THROUGHPUT: "make bench",
    KERNELS: "make bench-kernels",
    PIPELINE: "python benchmarks/pipeline_bubble.py --output",
}
PACKAGES = {
    "hf-": "transformers",
    "liger": "liger-kernel",
    "litgpt": "litgpt",
    "torchtitan": "torchtitan",
    "megatron": "megatron-core",
}
"""Part of a contender's name → the package whose version matters."""
Chosen = Mapping[str, str]


def missing(results: Path) -> list[str]:
    """Files and folders of records that are not there."""
    return [name for name in MAKERS if not read(results / name)]


def absent(results: Path, name: str) -> str:
    """Instead of a table."""
    return f"*{results.name}/{name} is not there yet: `{MAKERS[name]}` writes it.*"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown of a table."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in [header, *rows])
    return "\n".join([head, "|" + "---|" * len(header), *body])


def made_by(records: Sequence[Record], *facts: str) -> str:
    """The line below a table: commands, machine, commits and dates of its records."""
    commands = dict.fromkeys(re.sub(r"bench_\w+", "bench_OP", str(r["command"])) for r in records)
    machines = dict.fromkeys(str(machine_of(record)) for record in records)
    commits = dict.fromkeys(str(r.get("commit") or r.get("machine", {}).get("commit", "")) for r in records)
    versions = dict.fromkeys(
        str(record.get("versions", record.get("machine", {})).get("torch", "")) for record in records
    )
    dates = sorted({str(record["time"])[:10] for record in records if "time" in record})
    parts = [*machines, *(f"torch {version}" for version in versions if version), *facts]
    parts += [
        f"commit {', '.join(filter(None, commits))}",
        " and ".join(dict.fromkeys(dates[:1] + dates[-1:])),
    ]
    return f"{', '.join(f'`{command}`' for command in commands)}: {'; '.join(filter(None, parts))}."


def ratio(value: float) -> str:
    """With about two figures."""
    return f"{value:.2f}" if value < 0.995 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def percent(value: float, digits: int = 1) -> str:
    """A share, in %."""
    return f"{100 * value:.{digits}f} %"


# --- training throughput, beside other trainers ----------------------------------------------------------------


def throughput_summary(results: Path, chosen: Chosen) -> str:
    """One line for each comparison: ours beside the best of the others in each column."""
    records = comparisons(results, chosen)
    if not records:
        return absent(results, THROUGHPUT)
    header = ["machine", "model", "tokens/s", "fastest peer's", "×", "share of the measured GEMM"]
    header += ["peak memory, GB, of the least peer's", "of it above state", "measured"]
    return table(header, (summary_row(record) for record in records if all(ours_and_peers(record))))


def summary_row(record: Record) -> list[str]:
    """Our fastest contender against the fastest peer, and against the one with the least memory."""
    ours, peers = ours_and_peers(record)
    first, fastest = ours[0], peers[0]
    times = first["tokens_per_s"] / fastest["tokens_per_s"]
    clock = "" if record["clock"] == "wall" else ", CPU time"
    layout = f", {record['layout']}" if record.get("layout") else ""
    return [
        str(machine_of(record)),
        f"`{record['preset']}`, {record['precision']}{layout}{clock}",
        f"{first['tokens_per_s']:,.0f}",
        f"{fastest['tokens_per_s']:,.0f}",
        f"**{times:.{2 if times < 10 else 0}f}**",
        percent(first["gemm_fraction"]),
        *(beside_least(first, peers, of) for of in ("peak_memory", "memory_above_state")),
        str(record["time"])[:10],
    ]


def beside_least(ours: Record, peers: Sequence[Record], of: str) -> str:
    """Ours, the least of the others, and our share of it; empty where it was not measured."""
    least = min(
        (p for p in peers if p.get(f"{of}_bytes")), key=lambda peer: peer[f"{of}_bytes"], default=None
    )
    if least is None or ours.get(f"{of}_bytes") is None:
        return ""
    share = ours[f"{of}_bytes"] / least[f"{of}_bytes"]
    return f"{gigabytes(ours, of)} of {gigabytes(least, of)} ({share:.2f})"


def throughput_tables(results: Path, chosen: Chosen) -> str:
    """One table for each shape, precision and machine by the wall clock; below, the same by process time."""
    records = comparisons(results, chosen)
    if not records:
        return absent(results, THROUGHPUT)
    walls = [record for record in records if record["clock"] == "wall"]
    shown = {same_work(record) for record in walls}
    beside = [record for record in records if record["clock"] != "wall"]
    tables = [throughput_table(r, [b for b in beside if same_work(b) == same_work(r)]) for r in walls]
    return "\n\n".join([*tables, *(throughput_table(b, []) for b in beside if same_work(b) not in shown)])


def comparisons(results: Path, chosen: Chosen) -> list[Record]:
    """The chosen records, those of the kind of machine with the fastest matrix product first; none if there is no file.

    Raises:
        ValueError: there are records, but none that is chosen.
    """
    records = throughput(results)
    found = [r for r in records if all(str(r.get(field)) == value for field, value in chosen.items())]
    if records and not found:
        words = " ".join(f"{field}={value}" for field, value in chosen.items())
        raise ValueError(f"no record of {THROUGHPUT} has {words}: measure it, or change the marker")
    peaks: dict[Machine, float] = {}
    for record in found:
        kind = kind_of_machine(record)
        peaks[kind] = max(peaks.get(kind, 0.0), record["gemm_peak_tflops"])
    return sorted(found, key=lambda record: (-peaks[kind_of_machine(record)], record["clock"] != "wall"))


def kind_of_machine(record: Record) -> Machine:
    """The machine, whatever the number of threads."""
    return replace(machine_of(record), threads=0)


def same_work(record: Record) -> tuple[object, ...]:
    """What a run by the wall clock and one by process time have in common."""
    fields = ("preset", "seq_length", "micro_batch_size", "tokens_per_step", "precision", "layout")
    return (*(record.get(field) for field in fields), kind_of_machine(record))


def throughput_table(record: Record, beside: Sequence[Record]) -> str:
    """All contenders of one run."""
    ours, peers = ours_and_peers(record)
    best = peers[0]["tokens_per_s"] if peers else None
    on_gemm = record.get("table_peak_tflops") is None  # the peak of both MFUs is the measured product then
    allocator = Counter(c.get("allocator") for c in [*ours, *peers]).most_common(1)[0][0]
    header = ["", "tokens/s", "/ best peer", "step, ms (p10 – p90)"]
    header += ["MFU causal / full, of the measured GEMM"] if on_gemm else ["MFU causal / full"]
    header += [] if on_gemm else ["share of the measured GEMM peak"]
    header += ["peak memory, GB", "of it above state, GB", "what it is"]
    rows = []
    for contender in sorted([*ours, *peers], key=lambda c: -c["tokens_per_s"]):
        name = f"`{contender['name']}`"
        if contender.get("allocator") != allocator:
            name += f" ({contender['allocator']})"
        row = [f"**{name}**" if contender in ours else name, f"{contender['tokens_per_s']:,.0f}"]
        row.append("" if best is None else f"{contender['tokens_per_s'] / best:.2f}")
        low, middle, high = (milliseconds(contender[f"step_ms_p{p}"]) for p in (10, 50, 90))
        row.append(f"{middle} ({low} – {high})")
        row.append(f"{percent(contender['mfu_causal'])} / {percent(contender['mfu_full'])}")
        row += [] if on_gemm else [percent(contender["gemm_fraction"])]
        row += [gigabytes(contender, of) for of in ("peak_memory", "memory_above_state")]
        rows.append([*row, str(contender.get("description", ""))])
    batch = f"{record['tokens_per_step']:,} tokens a step in micro-batches of "
    batch += f"{record['micro_batch_size']} × {record['seq_length']:,}"
    layout = f", {record['layout']}" if record.get("layout") else ""
    clock = "" if record["clock"] == "wall" else ", CPU time of the process"
    lines = [f"**`{record['preset']}`, {record['precision']}**, {batch}{layout}{clock}:", ""]
    below = [throughput_facts(record, allocator), *(in_short(b) for b in beside)]
    return "\n".join([*lines, table(header, rows), "", "\n\n".join(below)])


def milliseconds(value: float) -> str:
    """With at least three figures."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def gigabytes(contender: Record, of: str) -> str:
    """A cell of memory, in 10^9 bytes."""
    value = contender.get(f"{of}_bytes")
    return "" if value is None else f"{value / 1e9:.2f}"


def in_short(record: Record) -> str:
    """A run by process time: ours, and the two fastest of the others."""
    ours, peers = ours_and_peers(record)
    rates = [f"`{c['name']}` {c['tokens_per_s']:,.0f}" for c in [*ours[:1], *peers[:2]]]
    best = (
        f" ({ours[0]['tokens_per_s'] / peers[0]['tokens_per_s']:.2f} of the best peer)"
        if ours and peers
        else ""
    )
    return f"The same by CPU time of the process, tokens/s: {', '.join(rates)}{best}. {made_by([record])}"


def throughput_facts(record: Record, allocator: str | None) -> str:
    """The line below a comparison: what it was made with and what it left out."""
    products = f"best of {len(record['gemm_shapes'])} matrix products"
    facts = [f"measured GEMM peak {record['gemm_peak_tflops']:,.3g} TFLOP/s ({products})"]
    if record.get("table_peak_tflops") is not None:
        facts.append(f"MFU of {record['table_peak_tflops']:,.0f} TFLOP/s ({record['peak_source']})")
    facts += [f"allocator {allocator}, where no other is named"] if allocator else []
    order = "in turns" if record.get("in_turns", True) else "one after the other"
    facts.append(f"{record['rounds']} rounds of {record['steps_per_round']} steps, contenders {order}")
    if (apart := loss_difference(record)) is not None:
        facts.append(f"losses of the same steps within {percent(apart, 2)}")
    names = [contender["name"] for contender in record["contenders"]]
    packages = [package for part, package in PACKAGES.items() if any(part in name for name in names)]
    facts += [f"{package} {record['versions'].get(package)}" for package in packages]
    facts += [f"left out: `{skipped['name']}` ({skipped['reason']})" for skipped in record.get("skipped", ())]
    return made_by([record], *facts)


def loss_difference(record: Record) -> float | None:
    """Largest relative difference of two contenders' losses at one step; None without two that recorded any."""
    losses = [c["losses"] for c in record["contenders"] if c.get("losses")]
    if len(losses) < 2:
        return None
    return max((max(step) - min(step)) / min(step) for step in zip(*losses, strict=False))


# --- kernels ---------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """Of the table of kernels."""

    name: str
    case: str
    sizes: str
    """How a shape is written, by its letters."""
    of: Mapping[str, int] | None = None
    """Shapes to show, where a case has been measured in several; all where none matches (another device)."""


KERNEL_ROWS = (
    Row("`rms_norm` + residual", "rms_norm residual", "{T} × {H}"),
    Row("`layer_norm`", "layer_norm", "{T} × {H}"),
    Row("`swiglu`", "swiglu", "{T} × {F}"),
    Row("`gelu` (tanh)", "gelu", "{T} × {F}"),
    Row("`rope`", "rope", "{S} × ({N} + {K}) × {D}"),
    Row("`attention`, causal", "attention causal", "S {S}, {N}/{K} heads of {D}", {"S": 2048}),
    Row("`attention`, packed documents", "attention packed", "{S} tokens, {N}/{K} heads of {D}"),
    Row("`linear`", "linear main_grad", "{T} × {I} × {O}"),
    Row("`cross_entropy`", "cross_entropy", "{T} × {V}", {"V": 32000}),
    Row("`linear_cross_entropy`", "linear_cross_entropy", "{T} × {H} × {V}"),
    Row("`embedding`", "embedding", "{T} of {V} × {H}"),
    Row("`adamw_`", "adamw_", "{millions:.1f}M"),
    Row("`grad_norm`", "grad_norm", "{millions:.1f}M"),
)
Speeds = dict[tuple[str, str], Record]
"""(variant, dtype) to its record."""
CaseAndShape = tuple[str, tuple[tuple[str, int], ...]]


def kernel_tables(results: Path, chosen: Chosen) -> str:
    """One table for each machine."""
    found = [r for r in read(results / KERNELS) if all(str(r.get(k)) == v for k, v in chosen.items())]
    if not found:
        return absent(results, KERNELS)
    machines = dict.fromkeys(machine_of(record) for record in found)
    return "\n\n".join(kernel_table(machine, found) for machine in machines)


def kernel_table(machine: Machine, records: Sequence[Record]) -> str:
    """Every op on one machine, forward and (where there is one) backward."""
    whole = kernel_speeds([record for record in records if machine_of(record) == machine])
    rows, used = [], []
    for row in KERNEL_ROWS:
        shapes = [shape for case, shape in whole if case == row.case]
        some = [shape for shape in shapes if (row.of or {}).items() <= dict(shape).items()]
        for shape in some or shapes:
            speeds = whole[row.case, shape]
            sizes = dict(shape)
            text = row.sizes.format(**sizes, millions=sizes.get("n", 0) / 1e6)
            batch = f"{sizes['B']} × " if sizes.get("B", 1) > 1 else ""
            rows.append([row.name, batch + text, *(kernel_cell(speeds, dtype) for dtype in ("bf16", "fp32"))])
            used += list(speeds.values())
    header = ["op", "shape", *(f"{dtype}: × eager, × compile, share" for dtype in ("bf16", "fp32"))]
    return f"{table(header, rows)}\n\n{made_by(used)}"


def kernel_speeds(records: Iterable[Record]) -> dict[CaseAndShape, Speeds]:
    """(case, shape) to the newest record of each (variant, dtype) with the most passes; yardsticks left out."""
    found: dict[CaseAndShape, Speeds] = {}
    for record in records:
        if record["variant"] in ("copy", "product"):
            continue
        speeds = found.setdefault((record["case"], tuple(record["shape"].items())), {})
        old = speeds.get((record["variant"], record["dtype"]))
        if old is None or record["pass"] != "forward" or old["pass"] == "forward":
            speeds[record["variant"], record["dtype"]] = record
    return found


def kernel_share(record: Record) -> float:
    """Of the yardstick that bounds the op: the other one's share is far smaller at these shapes."""
    return float(max(record["of_copy"], record["of_gemm"]))


def kernel_cell(speeds: Speeds, dtype: str) -> str:
    """Times of torch eager and of torch.compile over ours, and our share of a copy or of a matrix product."""
    ours = speeds.get(("megalite", dtype))
    if ours is None:
        return ""
    others = [speeds.get((variant, dtype)) for variant in ("torch", "compile")]
    ratios = ["–" if other is None else ratio(other["median_ms"] / ours["median_ms"]) for other in others]
    return f"{', '.join(ratios)}, {percent(kernel_share(ours), 0)}"


# --- pipeline schedules ----------------------------------------------------------------------------------------


def pipeline_table(results: Path, chosen: Chosen) -> str:
    """Measured and simulated steps of every schedule."""
    found = [r for r in read(results / PIPELINE) if all(str(r.get(k)) == v for k, v in chosen.items())]
    if not found:
        return absent(results, PIPELINE)
    rows = []
    newest_of_each = newest(found, lambda r: (machine_of(r), r["pp"], r["schedule"], r["micro_batches"]))
    for record in newest_of_each.values():
        step = f"{record['step_ms_p50']:.0f}, {record['simulated_step_ms']:.0f} ms"
        idle = f"{percent(record['bubble'])}, {percent(record['simulated_bubble'])}"
        rows.append([f"`{record['schedule']}`", step, idle, percent(record["even_bubble"])])
    header = ["schedule", "step, simulated", "idle, simulated", "idle with even stages"]
    return f"{table(header, rows)}\n\n{made_by(list(newest_of_each.values()))}"


SECTIONS: Mapping[str, Callable[[Path, Chosen], str]] = {
    "throughput-summary": throughput_summary,
    "throughput": throughput_tables,
    "kernels": kernel_tables,
    "cuda-kernels": cuda_kernels,
    "pipeline": pipeline_table,
}
