"""Whether CUDA kernels can run here, and where their code would come from: what the doctor says of them."""

from __future__ import annotations

import os
from typing import Any

import torch

from megalite_kernels.native.cuda import binaries, cache, libcuda, nvrtc, sources
from megalite_kernels.native.cuda.runtime import EMULATE


def state() -> dict[str, Any]:
    """Plain values for JSON: `usable`, and what decides it."""
    emulated = os.environ.get(EMULATE) or None
    found: dict[str, Any] = {
        "driver": None,
        "driver_problem": None,
        "nvrtc": None,
        "archive": None,
        "shipped": len(sources.shipped()),
        "cache": str(cache.folder()),
        "emulated": emulated,
        "devices": [],
    }
    try:
        found["driver"] = ".".join(map(str, libcuda.driver().version()))
    except RuntimeError as error:
        found["driver_problem"] = str(error)
    compiler = nvrtc.find(_cuda_major())
    if compiler is not None:
        found["nvrtc"] = {"version": ".".join(map(str, compiler.version)), "file": compiler.path}
    if binaries.archive().entries:
        found["archive"] = {"nvcc": binaries.archive().nvcc, "kernels": len(binaries.archive().entries)}
    found["devices"] = _devices() if found["driver"] is not None and torch.version.cuda is not None else []
    return found | {"usable": bool(emulated) or any(device["problem"] is None for device in found["devices"])}


def _cuda_major() -> int | None:
    return int(torch.version.cuda.split(".")[0]) if torch.version.cuda else None


def _devices() -> list[dict[str, Any]]:
    """Every GPU's compute capability, how many kernels were compiled for it, and why there are none to be had."""
    archive, devices = binaries.archive(), []
    keys = {sources.identity(kernel) for kernel in sources.shipped()}
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        devices.append(
            {
                "capability": f"{capability[0]}.{capability[1]}",
                "cubins": sum(archive.covers(key, capability) for key in keys),
                "problem": binaries.missing(capability, _cuda_major()),
            }
        )
    return devices


def describe(found: dict[str, Any]) -> str:
    """One sentence or two of `state`."""
    if found["emulated"]:
        return f"emulated on the CPU as sm_{found['emulated']} ({EMULATE}), for tests: very slow"
    if found["driver"] is None:
        return f"not usable: {found['driver_problem']}{_compilers(found)}"
    if not found["devices"]:
        why = "torch is built without CUDA" if torch.version.cuda is None else "torch finds no NVIDIA GPU"
        return f"not usable: {why}, though the driver is there (CUDA {found['driver']})"
    # GPUs of one kind share a line.
    lines = dict.fromkeys(_device_text(device, found) for device in found["devices"])
    return "; ".join(lines)


def _device_text(device: dict[str, Any], found: dict[str, Any]) -> str:
    name = f"sm_{device['capability'].replace('.', '')}"
    if device["problem"] is not None:
        return f"{name}: not usable: {device['problem']}"
    parts = []
    if device["cubins"]:
        parts.append(
            f"{device['cubins']} of {found['shipped']} compiled when installed (nvcc {found['archive']['nvcc']})"
        )
    if found["nvrtc"]:
        which = "the others" if parts else "all"
        parts.append(
            f"{which} compiled at first use by NVRTC {found['nvrtc']['version']}, kept in {found['cache']}"
        )
    elif device["cubins"] < found["shipped"]:
        which = "the others" if parts else "all"
        parts.append(f"{which} from PTX (nvcc {found['archive']['nvcc']}) by the driver; NVRTC was not found")
    return f"{name}: {', '.join(parts)}"


def _compilers(found: dict[str, Any]) -> str:
    here = [f"NVRTC {found['nvrtc']['version']}"] if found["nvrtc"] else []
    here += [f"{found['archive']['kernels']} compiled kernels"] if found["archive"] else []
    return f"; {' and '.join(here)} would be used with it" if here else ""
