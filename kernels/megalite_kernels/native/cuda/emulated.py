"""Runs CUDA kernels on the CPU: each instance is built by g++ against csrc/emulate and launched on CPU tensors.

What a GPU would let pass is an error here (csrc/emulate/README.md lists it all): accesses outside the tensors, races
on shared memory, absent lanes. `reporting` gives what a kernel did: bank conflicts, bytes moved.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megalite_kernels.native.cuda import emulated_build
from megalite_kernels.native.cuda.kernel import Argument, Kernel, TensorMap

SEED = "MEGALITE_CUDA_EMULATE_SEED"
"""Environment variable: 0 runs blocks, warps and lanes as they are numbered; others shuffle them."""

_MESSAGE_BYTES = 4096
_lock = threading.Lock()  # the runtime has one launch at a time, and autograd has threads


class EmulationError(RuntimeError):
    """A kernel did what it must not; the message names kernel, block, thread, and the line of its source."""


@dataclass(slots=True)
class Report:
    """What one launch did."""

    kernel: str
    bank_conflicts: int
    """Cycles that shared memory was busy beyond the least that the kernel's accesses need."""
    shared_wavefronts: int
    """Cycles that shared memory was busy in all."""
    global_read_bytes: int
    global_written_bytes: int
    global_sectors: int
    """Of 32 bytes: what memory moves for the accesses of warps, caches aside; bytes / 32 if all are coalesced."""
    barriers: int
    collectives: int
    switches: int


_COUNTS = [name for name in Report.__dataclass_fields__ if name != "kernel"]


class _Report(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in _COUNTS]


class _Region(ctypes.Structure):
    _fields_ = [
        ("host", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_uint32),
        ("argument", ctypes.c_uint32),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("call", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("cluster", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
        ("parameter_bytes", ctypes.c_void_p),
        ("parameter_size", ctypes.c_uint64),
        ("regions", ctypes.POINTER(_Region)),
        ("region_count", ctypes.c_uint32),
        ("message_size", ctypes.c_uint32),
        ("message", ctypes.c_char_p),
        ("report", ctypes.POINTER(_Report)),
    ]


_reports: list[list[Report]] = []


@contextlib.contextmanager
def reporting() -> Iterator[list[Report]]:
    """The reports of all launches within, in order."""
    reports: list[Report] = []
    _reports.append(reports)
    try:
        yield reports
    finally:
        _reports[:] = [other for other in _reports if other is not reports]  # equal ones are others


def seed() -> int:
    """The seed of the launches' orders, from the environment; 1 by default, so that nothing runs as numbered."""
    return int(os.environ.get(SEED, "1"))


def launch(kernel: Kernel, grid: tuple[int, int, int], args: Sequence[Argument]) -> None:
    """Run `kernel` on CPU tensors; see `runtime.launch`.

    Raises:
        EmulationError: the kernel did what it must not; the tensors are then as they were.
        BuildError: g++ is missing, or refuses the kernel.
    """
    built = emulated_build.load(kernel)
    _check_kinds(kernel, built.kinds, args)
    regions = _regions(args, built.kinds)
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    report = _Report()
    parameters = ctypes.create_string_buffer(128 * len(args) + 64)
    start = ctypes.addressof(parameters)
    aligned = -(-start // 64) * 64
    pointers = (ctypes.c_void_p * len(args))(*(aligned + 128 * place for place in range(len(args))))
    description = _Launch(
        kernel=kernel.name.encode(),
        call=built.call,
        grid=(ctypes.c_uint32 * 3)(*grid),
        threads=kernel.threads,
        shared_bytes=kernel.shared_bytes,
        cluster=kernel.cluster,
        seed=seed(),
        parameters=pointers,
        parameter_bytes=start,
        parameter_size=len(parameters),
        regions=(_Region * len(regions))(*regions),
        region_count=len(regions),
        message_size=_MESSAGE_BYTES,
        message=ctypes.cast(message, ctypes.c_char_p),
        report=ctypes.pointer(report),
    )
    with _lock:
        failed = built.runtime.emulate_open(ctypes.byref(description))
        if not failed:
            for place, value in enumerate(args):
                data = _encode(built.runtime, value)
                ctypes.memmove(aligned + 128 * place, data, len(data))
            failed = built.runtime.emulate_run(ctypes.byref(description))
    if failed:
        raise EmulationError(emulated_build.with_lines(message.value.decode(), built.path))
    for reports in _reports:
        reports.append(Report(kernel.name, *(getattr(report, name) for name in _COUNTS)))


def _check_kinds(kernel: Kernel, kinds: str, args: Sequence[Argument]) -> None:
    if len(args) != len(kinds):
        raise EmulationError(f"{kernel.name} takes {len(kinds)} parameters, and was given {len(args)}")
    takes = {"r": (Tensor, type(None)), "w": (Tensor, type(None)), "i": int, "f": float, "m": TensorMap}
    names = {"r": "a const pointer", "w": "a pointer", "i": "int64_t", "f": "float", "m": "a TensorMap"}
    for place, (kind, value) in enumerate(zip(kinds, args, strict=True)):
        if not isinstance(value, takes[kind]):  # type: ignore[arg-type]
            raise EmulationError(
                f"{kernel.name}: parameter {place} is {names[kind]}, and was given {type(value).__name__}"
            )
        tensor = value.tensor if isinstance(value, TensorMap) else value
        if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
            raise EmulationError(
                f"{kernel.name}: parameter {place} is a tensor on {tensor.device}, not the CPU"
            )


def _span(value: Argument) -> tuple[int, int] | None:
    """First byte, and end, of what a parameter points to."""
    if isinstance(value, TensorMap):
        begin = value.tensor.data_ptr()
        ends = (
            sum((n - 1) * s for n, s in zip(value.shape[1:], value.strides_bytes, strict=True))
            + value.shape[0] * value.tensor.element_size()
        )
        return begin, begin + ends
    if not isinstance(value, Tensor) or value.numel() == 0:
        return None
    last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    begin = value.data_ptr()
    return begin, begin + (last + 1) * value.element_size()


def _regions(args: Sequence[Argument], kinds: str) -> list[_Region]:
    """The memory of all tensors; those that overlap are one region, which the kernel may write if any may."""
    spans = []
    for place, (value, kind) in enumerate(zip(args, kinds, strict=True)):
        span = _span(value)
        if span is not None:
            spans.append((*span, kind != "r", place))
    merged: list[list[Any]] = []
    for begin, end, writable, place in sorted(spans):
        if merged and begin < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
            merged[-1][2] |= writable
        else:
            merged.append([begin, end, writable, place])
    return [_Region(begin, end - begin, writable, place) for begin, end, writable, place in merged]


def _encode(runtime: ctypes.CDLL, value: Argument) -> bytes:
    """A parameter's bytes, pointers as the kernel sees them."""
    if isinstance(value, TensorMap):
        return _encode_map(runtime, value)
    if isinstance(value, Tensor):
        return struct.pack("<Q", runtime.emulate_translate(value.data_ptr()) if value.numel() else 0)
    if value is None:
        return struct.pack("<Q", 0)
    return struct.pack("<f" if isinstance(value, float) else "<q", value)


def _encode_map(runtime: ctypes.CDLL, value: TensorMap) -> bytes:
    """The emulator's own form of a tensor map: struct EncodedMap in csrc/emulate/state.h."""
    rank = len(value.shape)
    shape = value.shape + (1,) * (5 - rank)
    box = value.box + (1,) * (5 - rank)
    strides = value.strides_bytes + (0,) * (5 - rank)
    base = runtime.emulate_translate(value.tensor.data_ptr())
    size = value.tensor.element_size()
    return struct.pack("<Q4Q5I5I3I", base, *strides[:4], *shape, *box, rank, size, value.swizzle)
