"""What this machine and this installation are: facts for the doctor and for every benchmark record."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from megalite_kernels.native.cuda import state
from megalite_kernels.timing import device_name

NO_GPU = "GPU: none found; GPU kernels were not measured on this machine"
PEERS = ("flash_attn", "apex", "liger_kernel", "quack", "cut_cross_entropy")
"""Optional packages: back-ends or baselines where they are installed."""


def facts() -> dict[str, Any]:
    """Versions, devices and the native library, as plain values for JSON."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "numpy": version("numpy"),
        },
        "cpu": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "native": native_library(),
        "cuda_kernels": state.state(),
        "gpus": gpus(),
        "peers": {name: peer_version(name) for name in PEERS},
        "commit": commit(),
    }


def version(package: str) -> str | None:
    """Version of an installed package by its import name, without importing it; None if it isn't there."""
    try:
        if importlib.util.find_spec(package) is None:
            return None
    except (ImportError, ValueError):
        return None
    try:
        owners = importlib.metadata.packages_distributions().get(package, [package])
        return importlib.metadata.version(owners[0])
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def peer_version(package: str) -> str | None:
    """As `version`; tells NVIDIA's apex from the unrelated package of that name on PyPI."""
    found = version(package)
    if package == "apex" and found is not None and version("fused_layer_norm_cuda") is None:
        return f"{found} (without NVIDIA's fused_layer_norm_cuda: not used)"
    return found


def native_library() -> dict[str, Any]:
    """Where the native library is and which instruction set it uses, or why it isn't there."""
    try:
        module = importlib.import_module("megalite_kernels._C")
    except ImportError as error:
        return {"built": False, "reason": str(error)}
    return {"built": True, "isa": module.isa_name(), "file": str(module.__file__)}


def gpus() -> list[dict[str, Any]]:
    """Name, memory, architecture and driver of every GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    driver = _driver()
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "architecture": getattr(
                    properties, "gcnArchName", f"sm_{properties.major}{properties.minor}"
                ),
                "driver": driver,
            }
        )
    return found


def _driver() -> str:
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[0]


def commit() -> str:
    """Commit of the source tree that runs, with a + if it is modified; empty outside a checkout."""
    folder = str(Path(__file__).resolve().parent)
    return _output(["git", "-C", folder, "describe", "--always", "--dirty=+", "--abbrev=12"])


def _output(command: list[str]) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def describe(found: dict[str, Any]) -> list[tuple[str, str]]:
    """`facts` as (name, text) lines."""
    versions = found["versions"]
    native = found["native"]
    library = f"built, {native['isa']}" if native["built"] else f"not built ({native['reason']})"
    lines = [
        ("versions", ", ".join(f"{name} {text or 'not installed'}" for name, text in versions.items())),
        ("CPU", f"{found['cpu']}, {found['threads']} thread(s); OMP_NUM_THREADS {_omp()}"),
        ("native library", library),
        ("CUDA kernels", state.describe(found["cuda_kernels"])),
    ]
    for gpu in found["gpus"]:
        driver = gpu["driver"] or "unknown"
        text = f"{gpu['name']}, {gpu['memory_gib']} GiB, {gpu['architecture']}, driver {driver}"
        lines.append(("GPU", text))
    if not found["gpus"]:
        lines.append(("", NO_GPU))
    peers = ", ".join(f"{name} {text}" for name, text in found["peers"].items() if text)
    return [*lines, ("optional peers", peers or f"none of {', '.join(found['peers'])} is installed")]


def _omp() -> str:
    return os.environ.get("OMP_NUM_THREADS", "not set")
