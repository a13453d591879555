"""memory_by_layout: every layout can be estimated, and one is measured from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.memory_by_layout import LAYOUTS, benchmark_model, status_bytes
from megalite.config import ParallelConfig
from megalite.train.memory_activations import Job
from megalite.train.memory_estimate import worst_rank
from tests.helpers.source import ROOT


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_an_estimate(name: str) -> None:
    processes, settings, recompute = LAYOUTS[name]
    job = Job(
        model=benchmark_model(""),
        parallel=ParallelConfig(**settings),
        world_size=processes,
        tokens=1024,
        num_microbatches=4,
        itemsize=4,
        recompute=recompute,
    )
    assert worst_rank(job).total > 0


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)
def test_one_process_from_end_to_end(tmp_path: Path) -> None:
    """The estimate of a step that is large enough to rise above what the process needs anyway."""
    output = tmp_path / "records.jsonl"
    command = [sys.executable, "benchmarks/memory_by_layout.py", "--layouts", "one", "--output", str(output)]
    command += ["--tokens", "512", "--micro-batches", "1", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert output.exists(), done.stdout + done.stderr
    record = json.loads(output.read_text())
    assert record["benchmark"] == "memory_by_layout"
    assert [rank["pp_rank"] for rank in record["ranks"]] == [0]
    # 2 to 4 % were seen; small tensors on the heap and the allocator's own pages are not estimated.
    assert record["ranks"][0]["measured_over_estimated"] == pytest.approx(1.0, abs=0.1)


def test_sizes_of_this_process() -> None:
    assert status_bytes("VmHWM") >= status_bytes("VmRSS") > 1 << 20
