"""Compiles the CUDA kernels with nvcc for GPUs that are not here, and reads what came out.

    python -m tests.cuda_gate.gate [rms_norm ...]    compiles the cases of cases_rms_norm.py ... (all of them without
                                                     a name) and writes their tables, table_rms_norm.json ...

Each `cases_*.py` in this folder has a list `CASES` of kernel instances at real sizes; the test compiles them again for
every target and compares registers, spills, shared memory and the count of telling instructions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite_kernels.native.cuda import build, nvrtc, sources
from megalite_kernels.native.cuda.kernel import Kernel

FOLDER = Path(__file__).parent
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90a": 227 << 10, "sm_100a": 227 << 10}
"""Bytes of shared memory one block may have."""
REGISTERS = 65536
"""Of a multiprocessor; a block's must fit, as it is launched with all its threads."""
INSTRUCTIONS = (
    "HMMA", "HGMMA", "LDSM", "STSM", "LDGSTS", "UTMALDG", "UTMASTG", "SYNCS", "USETMAXREG", "UCGABAR_ARV", "BAR.SYNC",
    "SHFL", "MUFU", "LDG", "LDG.E.128", "STG", "STG.E.128", "LDS", "STS", "LDL", "STL", "ATOM", "RED",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel instance at a real size."""

    name: str
    """Op and what the instance is for; the key in the table."""
    kernel: Kernel
    required: tuple[str, ...] = ()
    """Instructions (beginnings of their names) that the SASS of every target must have."""
    required_by_target: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """More of them, by target."""
    targets: tuple[str, ...] = ()
    """Of sm_80, sm_90a, sm_100a; by default all that the kernel is shipped for."""

    def compiled_for(self) -> tuple[str, ...]:
        """The targets to compile for."""
        return self.targets or tuple(f"sm_{one}" for one in sources.CUBINS[self.kernel.target])


Row = dict[str, Any]


@functools.cache
def compiler() -> build.Nvcc | None:
    """The nvcc of the pip packages if it is there, whose version the tables are of, else any."""
    return build.find_nvcc(packages_first=True)


def disassembler() -> str | None:
    """cuobjdump: of Triton's wheel, else of a toolkit."""
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.is_file():
            return str(tool)
    return shutil.which("cuobjdump")


def missing_tools() -> str:
    """What the gate lacks here; empty if it can run."""
    lacks = [] if compiler() else ["nvcc (scripts/bootstrap.sh cuda)"]
    lacks += [] if disassembler() else ["cuobjdump (in Triton's wheel: scripts/bootstrap.sh triton)"]
    return f"needs {' and '.join(lacks)}" if lacks else ""


def compile_case(case: Case, target: str) -> Row:
    """The row of a case for one target.

    Raises:
        CompileError: nvcc refused.
    """
    nvcc = compiler()
    assert nvcc is not None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        said = build.compile_instance(
            case.kernel, nvcc, cubin, ["-cubin", f"-arch={target}", "-Xptxas", "-v"]
        )
        usage = re.search(r"Used (\d+) registers", said)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
        assert usage is not None, said
        assert stack is not None, said
        # ptxas calls it no warning that it waits for every wgmma, as registers don't suffice or branches may diverge.
        warnings = [line for line in said.splitlines() if re.search("warning|performance loss", line, re.I)]
        return ({"warnings": warnings} if warnings else {}) | {
            "case": case.name,
            "target": target,
            "kernel": case.kernel.name,
            "threads": case.kernel.threads,
            "registers": int(usage[1]),
            "stack_bytes": int(stack[1]),
            "spill_bytes": int(stack[2]) + int(stack[3]),
            "shared_bytes": case.kernel.shared_bytes,
            "instructions": count(sass(cubin), (*INSTRUCTIONS, *_required(case, target))),
        }


def _required(case: Case, target: str) -> tuple[str, ...]:
    return (*case.required, *case.required_by_target.get(target, ()))


def sass(cubin: Path, *options: str) -> str:
    """What cuobjdump says of a cubin: its SASS, unless other options are given."""
    command = [str(disassembler()), *(options or ("-sass",)), str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count(text: str, names: tuple[str, ...]) -> dict[str, int]:
    """How often instructions stand in SASS, by the beginnings of their names; those that do."""
    counts = {name: len(re.findall(rf"\s{re.escape(name)}(?=[.\s;])", text)) for name in names}
    return {name: number for name, number in counts.items() if number}


def usage_with_nvrtc(kernel: Kernel, target: str, library: nvrtc.Nvrtc) -> tuple[int, int]:
    """Registers and bytes of stack, which is where spills go, of an instance that NVRTC compiled."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(nvrtc.compile_kernel(kernel, target, library))
        found = re.search(r"REG:(\d+) STACK:(\d+)", sass(cubin, "--dump-resource-usage"))
    assert found is not None
    return int(found[1]), int(found[2])


def groups() -> list[str]:
    """Names of the `cases_*.py`."""
    return sorted(path.stem.removeprefix("cases_") for path in FOLDER.glob("cases_*.py"))


def cases(group: str) -> list[Case]:
    """The cases of one file."""
    found: list[Case] = importlib.import_module(f"tests.cuda_gate.cases_{group}").CASES
    return found


def table(group: str) -> dict[str, Any]:
    """What is committed for one file: the version of nvcc, and the rows."""
    content: dict[str, Any] = json.loads((FOLDER / f"table_{group}.json").read_text(encoding="utf-8"))
    return content


def broken_promises(row: Row, case: Case) -> list[str]:
    """What a compiled kernel must never do, whatever the table says."""
    target, found = row["target"], list(row.get("warnings", ()))
    if row["spill_bytes"] or row["stack_bytes"]:
        found.append(f"{row['spill_bytes']} bytes spilled, {row['stack_bytes']} bytes of stack")
    if row["shared_bytes"] > SHARED_LIMIT[target]:
        found.append(f"{row['shared_bytes']} bytes of shared memory, {SHARED_LIMIT[target]} is the limit")
    # Registers are given to warps in units of 256, that is 8 a thread.
    if (needed := -(-row["registers"] // 8) * 8 * -(-row["threads"] // 32) * 32) > REGISTERS:
        found.append(f"a block needs {needed} registers, a multiprocessor has {REGISTERS}")
    found += [f"no {name} instruction" for name in _required(case, target) if name not in row["instructions"]]
    return [f"{row['case']} {target}: {reason}" for reason in found]


def compile_group(group: str, jobs: int = 2) -> list[tuple[Case, Row]]:
    """Every case of a group for each of its targets, in order; nvcc runs `jobs` at a time."""
    work = [(case, target) for case in cases(group) for target in case.compiled_for()]
    with ThreadPoolExecutor(jobs) as pool:
        rows = pool.map(lambda pair: compile_case(*pair), work)
        return [(case, row) for (case, _), row in zip(work, rows, strict=True)]


def write_table(group: str) -> list[str]:
    """Compile a group's cases and write their table; returns the broken promises."""
    nvcc = compiler()
    assert nvcc is not None
    compiled = compile_group(group)
    lines = ",\n".join(json.dumps(row) for _, row in compiled)
    path = FOLDER / f"table_{group}.json"
    version = ".".join(map(str, nvcc.version))
    path.write_text(f'{{"nvcc": "{version}", "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{len(compiled)} kernels written to {path.name}")
    return [reason for case, row in compiled for reason in broken_promises(row, case)]


if __name__ == "__main__":
    if missing_tools():
        sys.exit(f"the gate {missing_tools()}")
    WRONG = [reason for group in sys.argv[1:] or groups() for reason in write_table(group)]
    print("\n".join(WRONG))
    sys.exit(1 if WRONG else 0)
