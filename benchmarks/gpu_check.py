"""Every kernel on this machine's NVIDIA GPU: contracts, the test catalogue, the benchmarks, and training steps.

What is right comes before what is fast: the parts cuda (contracts and the catalogue on the CUDA kernels, which are not
chosen by themselves where Triton's are preferred) and sanitizer (compute-sanitizer on them, where it is installed)
run before the benchmarks.

    PYTHONPATH=.:kernels python benchmarks/gpu_check.py --out results [--parts tests]

Needs torch, triton, numpy and pytest, no network and no installation. Each part is one or more processes with a
time limit, under ten minutes together; a part that fails or hangs does not stop the later ones. Everything goes
into the output folder, one record per process in gpu_check.jsonl, with card, driver, versions and commit. Exits
with 1 if anything failed, with 2 if there is no GPU.

The parts throughput-124m, throughput-1.5b and throughput-llama, run when they are asked for by name, compare trainers
by `train_throughput.py`; their records go to throughput.jsonl, and they need what training needs.

`--device cpu` rehearses the same steps on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "kernels")) if path not in sys.path]

PART_LIMIT_S = 570.0
"""Of one part: a call of ten minutes holds it."""
CUDA_TESTS = (
    "norms", "attention", "attention_parts", "cross_entropy", "cross_entropy_local", "adamw", "grad_norm", "rope",
)  # fmt: skip
"""Files of tests/ops with ops that have CUDA kernels."""
SANITIZERS = ("memcheck", "racecheck", "initcheck")
SANITIZER = "compute-sanitizer"
THROUGHPUT = {
    "throughput-124m": ["--preset", "gpt2-124m", "--micro-batch-size", "16"],
    "throughput-1.5b": ["--preset", "gpt2-1.5b", "--micro-batch-size", "4"],
    "throughput-llama": ["--preset", "llama3.2-3b", "--micro-batch-size", "2"],
}
"""Part → model and batch on which trainers are compared; 3.2B parameters with their state take 51 GB."""
PARTS = ("build", "doctor", "tests", "cuda", "sanitizer", "bench")
"""Run by default."""
NAMED = ("train", *THROUGHPUT)
"""Parts that train, which needs more packages: asked for by name."""
TRAINING = ("tyro", "rich", "tokenizers", "safetensors")
"""What those import besides."""


@dataclass(frozen=True, slots=True)
class Step:
    """One process."""

    part: str
    name: str
    command: list[str]
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)
    output: str = ""
    """File of the output folder that gets standard output; NAME.log by default."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a step ended."""

    part: str
    name: str
    ok: bool
    seconds: float
    summary: str


def steps(part: str, device: str, out: Path) -> Iterator[Step]:
    """The processes of a part."""
    python = sys.executable
    if part == "build":
        yield Step(part, "native library", [python, "setup.py", "-q", "build_ext", "--inplace"], 400)
    elif part == "doctor":
        doctor = [python, "-m", "megalite_kernels.doctor", "--device", device, "--json"]
        yield Step(part, "contracts", [*doctor, "--quick"], 280, output="contracts.json")
        yield Step(part, "speeds", doctor, 280, output="doctor.json")
    elif part == "tests":
        from tests.ops.catalogue import ABOUT_THE_CPU

        files = sorted((ROOT / "tests" / "ops").glob("test_*.py"))
        for file in (file for file in files if device == "cpu" or file.name not in ABOUT_THE_CPU):
            command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/ops/{file.name}"]
            yield Step(part, file.stem, command, 240, {"MEGALITE_TEST_DEVICE": device})
    elif part == "cuda":
        loader = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda_loader/test_on_gpu.py"]
        yield Step(part, "loader", loader, 120)
        contracts = [python, "-m", "benchmarks.cuda_check", "--device", device]
        yield Step(
            part, "contracts", contracts, 280, {"MEGALITE_CUDA_EMULATE": "80"} if device == "cpu" else {}
        )
        for name in CUDA_TESTS:
            command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/ops/test_{name}.py"]
            chosen = {"MEGALITE_TEST_DEVICE": device} | (
                {"MEGALITE_TEST_KERNELS": "cuda"} if device == "cuda" else {}
            )
            yield Step(part, name, command, 240, chosen)
    elif part == "sanitizer":
        yield from sanitizer_steps(device)
    elif part == "bench":
        kernels = [python, "-m", "benchmarks.kernels", "--device", device, "--limit", str(PART_LIMIT_S - 30)]
        yield Step(part, "kernels", [*kernels, "--output", str(out / "kernels")], PART_LIMIT_S)
    elif part == "train":
        for file in ("tests/train/test_step_on_gpu.py", "tests/data/test_copying.py"):
            command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
            yield Step(part, Path(file).stem, command, 280)
    elif part in THROUGHPUT:
        model = ["--preset", "tiny", "--vocab-size", "320"] if device == "cpu" else THROUGHPUT[part]
        command = [
            python,
            "benchmarks/train_throughput.py",
            *model,
            "--device",
            device,
            "--precision",
            precision(),
        ]
        yield Step(part, "trainers", [*command, "--output", str(out / "throughput.jsonl")], PART_LIMIT_S)


def sanitizer_steps(device: str) -> Iterator[Step]:
    """Every CUDA kernel at small shapes under each tool; torch's memory pool, which hides overruns, is off."""
    for tool in SANITIZERS:
        checked = [sys.executable, "-m", "benchmarks.cuda_check", "--run-only", "--device", device]
        under = [sanitizer() or SANITIZER, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        yield Step("sanitizer", tool, [*under, *checked], 180, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def sanitizer() -> str | None:
    """Where compute-sanitizer is; None if it isn't installed."""
    return shutil.which(SANITIZER) or shutil.which(f"/usr/local/cuda/bin/{SANITIZER}")


def precision() -> str:
    """fp8, in which run ours is timed in bf16 too, where the trainer has it; else bf16."""
    from megalite.config import TrainConfig

    return "fp8" if "fp8" in get_args(get_type_hints(TrainConfig)["precision"]) else "bf16"


def unbuildable() -> str | None:
    """None if the native library can be built here, else the reason."""
    if not any(shutil.which(compiler) for compiler in ("g++", "c++", "clang++")):
        return "no C++ compiler: the CPU's native library is not built"
    if importlib.util.find_spec("setuptools") is None:
        return "no setuptools: the CPU's native library is not built"
    return None


def run(step: Step, out: Path, limit_s: float) -> Result:
    """Run a step within a limit, its whole process group ended after it; its output goes into the folder."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), **step.environment}
    log = out / (step.output or f"{step.part}-{step.name.replace(' ', '_')}.log")
    errors = log.with_suffix(".err") if step.output else log
    start = time.monotonic()
    with log.open("wb") as file, errors.open("wb") if step.output else open(os.devnull, "wb") as other:
        stderr = other if step.output else subprocess.STDOUT
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=file, stderr=stderr, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - start
    ok = code == 0
    said = last_line(errors if step.output else log)
    text = f"stopped after {limit_s:.0f} s" if code is None else said or f"exit code {code}"
    return Result(
        step.part, step.name, ok, seconds, text if ok or code is None else f"exit code {code}: {text}"
    )


def last_line(path: Path) -> str:
    """The last line with something on it, shortened."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:200]


def run_part(part: str, device: str, out: Path) -> Iterator[Result]:
    """Run a part's steps within its time."""
    reason = unbuildable() if part == "build" else None
    if part == "sanitizer" and sanitizer() is None:
        yield Result(part, SANITIZER, True, 0.0, f"skipped: {SANITIZER} is not installed")
        return
    if part in NAMED and (missing := [name for name in TRAINING if importlib.util.find_spec(name) is None]):
        reason = f"training needs {', '.join(missing)}, not installed"
    if reason is not None:
        yield Result(part, "trainers" if part in NAMED else "native library", True, 0.0, f"skipped: {reason}")
        return
    deadline = time.monotonic() + PART_LIMIT_S
    for step in steps(part, device, out):
        left = deadline - time.monotonic()
        if left < 5:
            yield Result(part, step.name, False, 0.0, "not started: the part's time is used up")
            continue
        yield run(step, out, min(step.limit_s, left))


def machine(device: str) -> dict[str, Any]:
    """What every record says besides its result."""
    from megalite_kernels import environment
    from megalite_kernels.timing import device_name

    facts = environment.facts()
    driver = facts["gpus"][0]["driver"] if device == "cuda" else None
    return {
        "card": device_name(device),
        "driver": driver,
        "versions": facts["versions"],
        "commit": facts["commit"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; 0 if everything passed, 1 if not, 2 without a GPU or with wrong arguments."""
    parser = argparse.ArgumentParser(prog="gpu_check", description="Check and time every kernel on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for results, made if it is missing")
    parser.add_argument(
        "--parts",
        default=",".join(PARTS),
        help=f"comma-separated; {','.join(PARTS)} by default; also {','.join(NAMED)}",
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal")
    arguments = parser.parse_args(argv)
    parts = [part.strip() for part in arguments.parts.split(",") if part.strip()]
    if unknown := [part for part in parts if part not in (*PARTS, *NAMED)]:
        known = ", ".join((*PARTS, *NAMED))
        parser.error(f"part {unknown[0]!r} is not known: use some of {known}")
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        what = f"torch {torch.__version__} finds no GPU on this machine: nothing was checked"
        print(f"gpu-check: error: {what}", file=sys.stderr)
        return 2
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    facts = machine(arguments.device)
    print(
        f"{facts['card']}, driver {facts['driver'] or 'none'}, {facts['versions']}, commit {facts['commit']}"
    )
    failed = 0
    with (out / "gpu_check.jsonl").open("a", encoding="utf-8") as records:
        for part in parts:
            for result in run_part(part, arguments.device, out):
                failed += not result.ok
                mark = "ok    " if result.ok else "FAILED"
                print(
                    f"{mark} {part:<7} {result.name:<28} {result.seconds:6.1f} s  {result.summary}",
                    flush=True,
                )
                record = {
                    "part": part,
                    "step": result.name,
                    "ok": result.ok,
                    "seconds": round(result.seconds, 1),
                }
                records.write(json.dumps(record | {"summary": result.summary} | facts) + "\n")
                records.flush()
    print(f"{failed} failed; everything is in {out}" if failed else f"all passed; everything is in {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
