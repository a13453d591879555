"""Launches a kernel where its tensors are: on a GPU by the driver, elsewhere in the emulator."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from megalite_kernels.native.cuda.kernel import Argument, Kernel, check_arguments

EMULATE = "MEGALITE_CUDA_EMULATE"
"""Environment variable: the architecture (80, 90 or 100) that tensors on the CPU are given to the emulator as."""
ARCHITECTURES = (80, 90, 100)
EMULATED_MULTIPROCESSORS = 4
"""So few that a grid of one block per multiprocessor goes round its loop more than once in a small test."""

_architectures: dict[int, int] = {}
_multiprocessors: dict[int, int] = {}


def launch(
    kernel: Kernel, grid: tuple[int, int, int], args: Sequence[Argument], device: torch.device
) -> None:
    """Run `kernel` on `grid` blocks, on torch's current stream of `device`; an empty grid is nothing to do.

    Args:
        kernel: the instance.
        grid: blocks along x, y and z.
        args: the kernel's parameters in order: Tensor or None, int, float, TensorMap.
        device: where the tensors are.

    Raises:
        ValueError: the grid or an argument can't be launched.
        RuntimeError: the kernel does not compile or load, or the driver refuses the launch.
        EmulationError: in the emulator, what a GPU would not have reported.
    """
    check_arguments(kernel, grid, args)
    if 0 in grid:
        return
    if device.type == "cuda":
        from megalite_kernels.native.cuda import driver

        driver.launch(kernel, grid, args, device)
    else:
        from megalite_kernels.native.cuda import emulated

        emulated.launch(kernel, grid, args)


def arch(device: torch.device) -> int:
    """80, 90 or 100: the family of instructions `device` has, to choose a variant by."""
    if device.type != "cuda":
        return emulated_architecture()
    index = _index(device)
    if index not in _architectures:
        major = torch.cuda.get_device_capability(index)[0]
        _architectures[index] = min(major, 10) * 10
    return _architectures[index]


def multiprocessors(device: torch.device) -> int:
    """How many there are, for grids that stay: one or a few blocks on each."""
    if device.type != "cuda":
        return EMULATED_MULTIPROCESSORS
    index = _index(device)
    if index not in _multiprocessors:
        _multiprocessors[index] = torch.cuda.get_device_properties(index).multi_processor_count
    return _multiprocessors[index]


def shared_bytes_limit(device: torch.device) -> int:
    """Shared memory that one block may have; 99 KiB on sm_86 and sm_89, though their family is 80."""
    if device.type != "cuda":
        return (163 if emulated_architecture() == 80 else 227) << 10
    from megalite_kernels.native.cuda import driver

    return driver.device_of(_index(device)).shared_bytes_limit


def emulated_architecture() -> int:
    """What MEGALITE_CUDA_EMULATE says.

    Raises:
        RuntimeError: it is not set, or not 80, 90 or 100.
    """
    text = os.environ.get(EMULATE, "")
    if text not in map(str, ARCHITECTURES):
        raise RuntimeError(
            f"{EMULATE} is {text!r}: set it to {', '.join(map(str, ARCHITECTURES[:-1]))} or {ARCHITECTURES[-1]} "
            "to run CUDA kernels on tensors of the CPU"
        )
    return int(text)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
