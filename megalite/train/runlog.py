"""The files of a run directory: who writes what, and how a resumed run continues them.

Every file of records is JSON lines. A process can die in the middle of a line, and a resumed run repeats
steps after its checkpoint, so `continue_after` drops torn lines and records later than that step.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from megalite.errors import UserError


def finite_or_none(value: Any) -> Any:
    """JSON has no NaN: non-finite floats become null, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(item) for item in value]
    return value


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole records of a JSON-lines file; a torn last line is left out. A missing file has none."""
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}:{number}: not a JSON record ({error.msg}); mend or remove the line"
            ) from None
    return records


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by new content in one step, durable on disk before the old content goes."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class RunLog:
    """Writes the record files of one run directory (on the first rank; a no-op object elsewhere)."""

    METRICS, EVALS, EVENTS = "metrics.jsonl", "evals.jsonl", "events.jsonl"

    def __init__(self, directory: Path, *, enabled: bool = True) -> None:
        self.directory = directory
        self.enabled = enabled
        if enabled:
            directory.mkdir(parents=True, exist_ok=True)

    def append(self, name: str, records: list[dict[str, Any]]) -> None:
        """Add records to a file in one write."""
        if not self.enabled or not records:
            return
        lines = "".join(json.dumps(finite_or_none(r), allow_nan=False) + "\n" for r in records)
        with (self.directory / name).open("a", encoding="utf-8") as file:
            file.write(lines)

    def event(self, kind: str, step: int, **details: Any) -> None:
        """Add one event."""
        self.append(self.EVENTS, [{"step": step, "kind": kind, "time": time.time(), **details}])

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a whole JSON file."""
        if self.enabled:
            write_atomically(self.directory / name, json.dumps(finite_or_none(value), indent=1) + "\n")

    def continue_after(self, step: int) -> None:
        """Drop metrics and evaluations of steps later than `step`, and torn lines, before a run goes on."""
        if not self.enabled:
            return
        for name in (self.METRICS, self.EVALS):
            path = self.directory / name
            kept = [record for record in read_records(path) if record["step"] <= step]
            if path.exists():
                write_atomically(path, "".join(json.dumps(r) + "\n" for r in kept))
        events = self.directory / self.EVENTS
        if events.exists():
            write_atomically(events, "".join(json.dumps(r) + "\n" for r in read_records(events)))


class TensorBoard:
    """The same numbers for TensorBoard; nothing is written while disabled.

    Args:
        directory: folder of the event files.
        first_step: steps after this one, written before a crash, are hidden.
    """

    METRICS = ("loss", "grad_norm", "learning_rate", "tokens_per_s", "mfu_causal", "mfu_full", "step_ms")

    def __init__(self, directory: Path, *, enabled: bool, first_step: int = 0) -> None:
        self._writer: Any = None
        if enabled:
            from torch.utils.tensorboard import (
                SummaryWriter,
            )  # slow to import, and optional to everything else

            self._writer = SummaryWriter(str(directory), purge_step=first_step + 1)

    def add_metrics(self, records: list[dict[str, Any]]) -> None:
        """Step metrics."""
        if self._writer is None:
            return
        for record in records:
            for name in self.METRICS:
                self._writer.add_scalar(f"train/{name}", record[name], record["step"])

    def add_eval(self, record: dict[str, Any]) -> None:
        """A validation record and its sampled texts."""
        if self._writer is None:
            return
        for name in ("val_loss", "val_bits_per_byte"):
            self._writer.add_scalar(f"validation/{name}", record[name], record["step"])
        for i, sample in enumerate(record["samples"]):
            self._writer.add_text(f"sample/{i}", sample["prompt"] + sample["text"], record["step"])

    def close(self) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            self._writer.close()
