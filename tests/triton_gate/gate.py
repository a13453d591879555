"""Compiles the Triton kernels for GPUs that are not here, and reads what came out.

A case calls a launcher of `megalite_kernels.triton` with tensors of device "meta" at real shapes. A stand-in driver
names the architecture and nothing is launched: each kernel is compiled exactly as the launcher would have it, and
described by its registers, local memory (spills), shared memory and count of telling instructions.

    python -m tests.triton_gate.gate [norms ...]    compiles the cases of cases_norms.py ... (all of them without
                                                    a name) and writes their tables, table_norms.json ...

Each `cases_*.py` in this folder has a list `CASES`; the test compiles them again and compares.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

FOLDER = Path(__file__).parent
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory one block may have."""
NVIDIA_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "UTMALDG", "LDGSTS", "LDG", "STG", "LDL", "STL")
AMD_INSTRUCTIONS = ("v_mfma", "global_load", "buffer_load", "buffer_store", "scratch_store")
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a launcher."""

    name: str
    """Op and shapes; the key in the table."""
    run: Callable[[], object]
    """Makes its meta tensors and calls the launcher."""
    tensor_cores: tuple[str, ...] = ()
    """Names of the kernels which must use the tensor cores of every target."""
    targets: tuple[str, ...] = tuple(TARGETS)
    local_bytes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of local memory that may be used, by target: what isn't the kernel's, and why is said at the case."""


Row = dict[str, Any]


class _StandIn(DriverBase):  # type: ignore[misc]
    """A driver whose only device is `target`; a device number for each, as kernels are cached by that."""

    def __init__(self, name: str) -> None:
        self.target, self.number = TARGETS[name], list(TARGETS).index(name)

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> None:
        raise RuntimeError("there is no device to measure on")


@contextmanager
def compile_only(target: str) -> Iterator[list[tuple[str, Any]]]:
    """Inside the block launches only compile, for `target`; gives the list of (kernel name, compiled kernel)."""
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.__name__, kernel))
        return kernel

    before = triton.runtime.driver._active
    JITFunction.run = record
    triton.runtime.driver.set_active(_StandIn(target))
    try:
        yield compiled
    finally:
        JITFunction.run, triton.runtime.driver._active = run, before


def compile_case(case: Case, target: str) -> list[Row]:
    """One row for each different kernel that the case launches, in order."""
    with compile_only(target) as compiled:
        case.run()
    rows = [
        {"case": case.name, "target": target, "kernel": name} | describe(kernel) for name, kernel in compiled
    ]
    return [row for i, row in enumerate(rows) if row not in rows[:i]]


def describe(kernel: Any) -> Row:
    """Warps, registers, bytes of local and shared memory, instructions."""
    common = {"warps": kernel.metadata.num_warps, "shared_bytes": kernel.metadata.shared}
    if "cubin" in kernel.asm:
        return common | _describe_nvidia(kernel.asm["cubin"])
    text = kernel.asm["amdgcn"]
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text))
    return common | {
        "registers": int(found["vgpr_count"]),
        "local_bytes": 4 * int(found["vgpr_spill_count"]),
        "instructions": _count(text, AMD_INSTRUCTIONS),
    }


def _describe_nvidia(cubin: bytes) -> Row:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [tool, "--dump-resource-usage", "-sass", path], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, text[:500]
    return {
        "registers": int(usage[1]),
        "local_bytes": int(usage[2]),
        "instructions": _count(text, NVIDIA_INSTRUCTIONS),
    }


def _count(text: str, names: tuple[str, ...]) -> dict[str, int]:
    counts = {name: len(re.findall(rf"\b{name}", text)) for name in names}
    return {name: count for name, count in counts.items() if count}


def groups() -> list[str]:
    """Names of the `cases_*.py`."""
    return sorted(path.stem.removeprefix("cases_") for path in FOLDER.glob("cases_*.py"))


def cases(group: str) -> list[Case]:
    """The cases of one file."""
    found: list[Case] = importlib.import_module(f"tests.triton_gate.cases_{group}").CASES
    return found


def table(group: str) -> dict[str, Any]:
    """What is committed for one file: the Triton version, and the rows."""
    content: dict[str, Any] = json.loads((FOLDER / f"table_{group}.json").read_text(encoding="utf-8"))
    return content


def broken_promises(row: Row, case: Case) -> list[str]:
    """What a compiled kernel must never do, whatever the table says."""
    target, found = row["target"], []
    if row["local_bytes"] > case.local_bytes.get(target, 0):
        found.append(f"{row['local_bytes']} bytes of registers are spilled")
    if row["shared_bytes"] > SHARED_LIMIT[target]:
        found.append(f"{row['shared_bytes']} bytes of shared memory, {SHARED_LIMIT[target]} is the limit")
    if row["kernel"] in case.tensor_cores and TENSOR_CORES[target] not in row["instructions"]:
        found.append(f"no {TENSOR_CORES[target]} instruction")
    return [f"{row['case']} {target} {row['kernel']}: {reason}" for reason in found]


def write_table(group: str) -> list[str]:
    """Compile a group's cases and write their table; returns the broken promises."""
    rows, wrong = [], []
    for case in cases(group):
        for target in case.targets:
            for row in compile_case(case, target):
                rows.append(row)
                wrong += broken_promises(row, case)
    lines = ",\n".join(json.dumps(row) for row in rows)
    path = FOLDER / f"table_{group}.json"
    path.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{len(rows)} kernels written to {path.name}")
    return wrong


if __name__ == "__main__":
    WRONG = [reason for group in sys.argv[1:] or groups() for reason in write_table(group)]
    print("\n".join(WRONG))
    sys.exit(1 if WRONG else 0)
