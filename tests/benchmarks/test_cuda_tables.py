"""README's table of CUDA kernels says what the gate's tables say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.cuda_tables import cuda_kernels


def row(case: str, target: str, registers: int, **changes: Any) -> dict[str, Any]:
    return {
        "case": case, "target": target, "kernel": "norm_forward", "threads": 256, "registers": registers,
        "stack_bytes": 0, "spill_bytes": 0, "shared_bytes": 1024, "instructions": {"LDG.E.128": 2, "LDGSTS": 1},
    } | changes  # fmt: skip


def test_a_kernel_is_a_line_with_the_range_of_its_instances(tmp_path: Path) -> None:
    rows = [
        row("small", "sm_80", 40),
        row("large", "sm_80", 64, shared_bytes=1536, threads=512),
        row("small", "sm_90a", 42),
        row("lab naive", "sm_80", 255),
        row("wide", "sm_90a", 168, kernel="attention", instructions={"HGMMA": 8, "UTMALDG": 2, "SYNCS": 4}),
    ]
    (tmp_path / "table_norms.json").write_text(json.dumps({"nvcc": "13.0.88", "rows": rows}))
    made = cuda_kernels(tmp_path, {}, tmp_path)
    assert "| `norm_forward` | 2 | 256 – 512 | 1 – 1.5 | 40 – 64, 42, – | `cp.async`, 16-byte loads |" in made
    assert "| `attention` | 1 | 256 | 1 | –, 168, – | `wgmma`, TMA loads, `mbarrier` |" in made
    assert made.endswith("nvcc 13.0.88: 4 compilations, 0 bytes of registers spilled.")


def test_without_tables_it_says_who_writes_them(tmp_path: Path) -> None:
    assert "python -m tests.cuda_gate.gate" in cuda_kernels(tmp_path, {}, tmp_path)


def test_it_is_a_section_of_the_document(tmp_path: Path) -> None:
    text = "<!-- benchmarks: cuda-kernels -->\n<!-- end -->\n"
    assert "cuda_gate" in tables.render(text, tmp_path, "there")
