"""The records under benchmarks/results: reading them, the newest of each kind, and which of them may be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Record = Mapping[str, Any]
Key = TypeVar("Key", bound=Hashable)

RESULTS = Path("benchmarks/results")
THROUGHPUT = "throughput.jsonl"
PIPELINE = "pipeline_bubble.jsonl"
KERNELS = "kernels"


@dataclass(frozen=True, slots=True)
class Machine:
    """What two runs must share for their ratios to mean the same.

    A GPU is its name; the host beside it counts little. A CPU is its model, cores, instruction set and threads.
    """

    device: str
    cores: int = 0
    isa: str = ""
    threads: int = 0

    def __str__(self) -> str:
        if not self.cores:
            return self.device
        parts = [
            self.device,
            f"{self.cores} cores",
            self.isa,
            f"{self.threads} thread{'s'[: self.threads != 1]}",
        ]
        return ", ".join(part for part in parts if part)


def machine_of(record: Record) -> Machine:
    """The machine class of a record of any benchmark."""
    machine = record.get("machine", {})
    kernel = "device_type" in record
    device = record["device"] if kernel else record.get("device", machine.get("device", "cpu"))
    if (record["device_type"] if kernel else device) != "cpu":
        return Machine(device)
    model, _, cores = (device if kernel else machine.get("cpu", "CPU")).partition(
        " ("
    )  # "AMD EPYC (2 cores)"
    return Machine(
        model,
        int(cores.split()[0]) if cores else machine["cores"],
        (record if kernel else machine).get("isa") or "",
        record.get("threads", machine.get("threads", 0)),
    )


def read(path: Path) -> list[Record]:
    """Records of one JSONL file, or of all those of a folder; none if there is nothing.

    Raises:
        ValueError: a line is not a JSON object.
    """
    if path.is_dir():
        return [record for file in sorted(path.glob("*.jsonl")) for record in read(file)]
    if not path.exists():
        return []
    found: list[Record] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number} is not JSON ({error}): remove the line or measure again"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number} is {type(record).__name__}, not an object: remove the line")
        found.append(record)
    return found


def newest(records: Iterable[Record], key: Callable[[Record], Key]) -> dict[Key, Record]:
    """The last record of each key (files are appended to), in the order in which keys came first."""
    return {key(record): record for record in records}


def throughput_key(record: Record) -> tuple[Hashable, ...]:
    """Of throughput runs that replace each other: same work on the same machine by the same clock."""
    fields = ("preset", "seq_length", "micro_batch_size", "tokens_per_step", "layout", "precision", "clock")
    return (*(record[field] for field in fields), machine_of(record))


def throughput(folder: Path, *, repeated: bool = False) -> list[Record]:
    """The newest throughput record of each key; `repeated`: of those with more than one measured step.

    One step, where a peer's takes minutes, shows its memory: for a plot of speeds, or to be measured again, it is not.
    """
    records = [r for r in read(folder / THROUGHPUT) if r.get("benchmark") == "throughput"]
    if repeated:
        records = [r for r in records if r["rounds"] * r["steps_per_round"] > 1]
    return list(newest(records, throughput_key).values())


def ours_and_peers(record: Record) -> tuple[list[Record], list[Record]]:
    """Contenders of a throughput record, ours and the others, each the fastest first."""
    ordered = sorted(record["contenders"], key=lambda contender: -contender["tokens_per_s"])
    return [c for c in ordered if c["kind"] == "ours"], [c for c in ordered if c["kind"] != "ours"]


def digest(records: Sequence[Record]) -> str:
    """Of what was recorded, whatever the spelling of the file."""
    text = "\n".join(json.dumps(record, sort_keys=True) for record in records)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
