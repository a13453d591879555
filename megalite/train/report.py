"""One self-contained HTML page about a run: did pre-training help, how did it go, what was it.

The page refers to no other file and no network; it can be mailed, printed and kept with the checkpoint.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megalite.train.overlap import ensure_overlap
from megalite.train.report_charts import draw_charts
from megalite.train.report_page import render_page
from megalite.train.report_records import RunRecords, read_run
from megalite.train.verdict import Verdict, judge


@dataclass(frozen=True, slots=True)
class Report:
    """What was written and what it says."""

    path: Path
    verdict: Verdict
    records: RunRecords


def write_report(run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of `run_dir` to `out` (``report.html`` inside it by default) and return its path.

    Raises:
        UserError: no run there, or matplotlib is missing.
        OSError: the page cannot be written.
    """
    return make_report(run_dir, out).path


def make_report(run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Report:
    """`write_report`, returning the verdict and the records too."""
    records = read_run(run_dir)
    ensure_overlap(records, Path(run_dir))
    verdict = judge(records)
    page = render_page(records, verdict, draw_charts(records))
    target = Path(out) if out is not None else Path(run_dir) / "report.html"
    part = target.with_name(f".{target.name}.part")
    part.write_text(page, encoding="utf-8")
    os.replace(part, target)
    return Report(target, verdict, records)
