"""README's table of CUDA kernels, from the tables that the compile gate commits: nothing in it ran on a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

GATE = Path(__file__).resolve().parents[1] / "tests" / "cuda_gate"
MEANINGS = {
    "HMMA": "`mma.sync`",
    "HGMMA": "`wgmma`",
    "LDSM": "`ldmatrix`",
    "STSM": "`stmatrix`",
    "LDGSTS": "`cp.async`",
    "UTMALDG": "TMA loads",
    "UTMASTG": "TMA stores",
    "SYNCS": "`mbarrier`",
    "UCGABAR_ARV": "clusters",
    "USETMAXREG": "`setmaxnreg`",
    "LDG.E.128": "16-byte loads",
}
"""Instructions of the SASS that say how a kernel works, as people call them."""
Rows = list[dict[str, Any]]


def read(folder: Path) -> tuple[Rows, list[str]]:
    """All rows of the gate's tables but for those of the lab's teaching kernels, and the versions of nvcc."""
    rows: Rows = []
    versions: dict[str, None] = {}
    for path in sorted(folder.glob("table_*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        versions[content["nvcc"]] = None
        rows += [row for row in content["rows"] if not row["case"].startswith("lab ")]
    return rows, list(versions)


def cuda_kernels(results: Path, chosen: Mapping[str, str], folder: Path = GATE) -> str:
    """Markdown of a table with a line for each kernel; where instances differ, a range over all of them."""
    rows, versions = read(folder)
    if not rows:
        return "*The compile gate has no tables yet: `python -m tests.cuda_gate.gate` writes them.*"
    registers = "registers: sm_80, sm_90a, sm_100a"
    cells = [("kernel", "instances", "threads", "shared memory, KiB", registers, "by its SASS")]
    cells += [
        _cells(name, [row for row in rows if row["kernel"] == name])
        for name in dict.fromkeys(row["kernel"] for row in rows)
    ]
    lines = [f"| {' | '.join(one)} |" for one in cells]
    lines.insert(1, "|" + "---|" * len(cells[0]))
    spilled = sum(row["spill_bytes"] for row in rows)
    made = (
        f"`python -m tests.cuda_gate.gate`, nvcc {', '.join(versions)}: {len(rows)} compilations, {spilled} bytes of "
        "registers spilled."
    )
    return "\n".join([*lines, "", made])


def _cells(name: str, rows: Rows) -> tuple[str, ...]:
    registers = []
    for target in ("sm_80", "sm_90a", "sm_100a"):
        there = [row["registers"] for row in rows if row["target"] == target]
        registers.append(_span(there) if there else "–")
    found = [meaning for key, meaning in MEANINGS.items() if any(key in row["instructions"] for row in rows)]
    return (
        f"`{name}`",
        str(len({row["case"] for row in rows})),
        _span(row["threads"] for row in rows),
        _span(round(row["shared_bytes"] / 1024, 1) for row in rows),
        ", ".join(registers),
        ", ".join(found) or "–",
    )


def _span(values: Iterable[float]) -> str:
    some = sorted(set(values))
    ends = [f"{value:g}" for value in (some[0], some[-1])]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} – {ends[1]}"
