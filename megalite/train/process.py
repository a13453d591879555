"""What the bits of a run depend on besides its configuration: machine, versions, layout, back-ends."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import torch

import megalite
import megalite_kernels
from megalite.config import ParallelConfig
from megalite.parallel.mesh import Mesh
from megalite_kernels.environment import native_library


def changed_environment(then: dict[str, Any], now: dict[str, Any]) -> tuple[str, ...]:
    """Each entry that differs, as "name: then, now"."""
    names = sorted(then.keys() | now.keys())
    return tuple(f"{n}: {then.get(n)} then, {now.get(n)} now" for n in names if then.get(n) != now.get(n))


def kernel_backends(device: torch.device) -> dict[str, str]:
    """Which back-end each op of `megalite_kernels` takes on this device."""
    return {choice.op: choice.backend for choice in megalite_kernels.explain(device.type)}


def environment(mesh: Mesh, parallel: ParallelConfig) -> dict[str, Any]:
    """What bitwise equality depends on besides the configuration."""
    device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"
    return {
        "megalite": megalite.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": device,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "native_isa": native_library().get("isa"),
        "threads": torch.get_num_threads(),
        "tp": mesh.tp.size,
        "cp": mesh.cp.size,
        "pp": mesh.pp.size,
        "dp": mesh.dp.size,
        "zero": parallel.zero,
        "backends": kernel_backends(mesh.device),
    }
