"""Loads kernels into a GPU's context and launches them on torch's current stream.

A kernel is loaded at its first launch on a device and kept. The calling thread's context is switched for as long as
a call takes, so any thread may launch on any device. Nothing synchronises. Loading is allowed while a CUDA graph is
captured: the thread's capture mode is relaxed meanwhile, and nothing of it is recorded.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megalite_kernels.native.cuda import binaries, libcuda
from megalite_kernels.native.cuda.kernel import Argument, Kernel, TensorMap
from megalite_kernels.native.cuda.libcuda import Driver, DriverError

DEFAULT_SHARED_BYTES = 48 << 10
"""What a block may have without asking."""
_LOG_BYTES = 8192
_MAPS_KEPT = 1024


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU: torch's number of it, its primary context (which torch uses too), and what it is."""

    index: int
    context: int
    capability: tuple[int, int]
    shared_bytes_limit: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A kernel in a device's context."""

    function: ctypes.c_void_p
    device: Device
    origin: str
    """Where its code came from, in words."""
    attributes: Any
    """Of a launch: an array of LaunchAttribute, or None."""


_devices: dict[int, Device] = {}
_loaded: dict[tuple[int, Kernel], Loaded] = {}
_maps: dict[tuple[Any, ...], bytes] = {}
_lock = threading.Lock()


def launch(kernel: Kernel, grid: Sequence[int], args: Sequence[Argument], device: torch.device) -> None:
    """Launch on torch's current stream of a CUDA device.

    Raises:
        RuntimeError: the kernel can't be compiled or loaded, or the driver refused the launch.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    found = _loaded.get((index, kernel)) or load(kernel, index)
    cuda = libcuda.driver()
    keep, pointers = _pack(cuda, kernel, args)
    config = libcuda.LaunchConfig(
        *grid, kernel.threads, 1, 1, kernel.shared_bytes, _stream(index), found.attributes,
        1 if found.attributes is not None else 0,
    )  # fmt: skip
    with _Current(cuda, found.device):
        status = cuda.library.cuLaunchKernelEx(ctypes.byref(config), found.function, pointers, None)
    del keep
    if status:
        raise DriverError(_refused(kernel, grid, found, args, cuda.message(status)))


def loaded() -> list[tuple[int, Kernel, str]]:
    """Device number, kernel and origin of its code, of all that are loaded."""
    return [(index, kernel, found.origin) for (index, kernel), found in _loaded.items()]


def load(kernel: Kernel, index: int) -> Loaded:
    """Compile if need be, load a kernel into a device's context, and allow it its shared memory.

    Raises:
        RuntimeError: as `launch`.
    """
    with _lock:
        found = _loaded.get((index, kernel))
        if found is None:
            cuda = libcuda.driver()
            device = device_of(index)
            _check_fits(kernel, device)
            binary = binaries.find(kernel, device.capability, _cuda_major())
            with _Current(cuda, device), _relaxed_capture(cuda):
                function = _load_function(cuda, kernel, device, binary)
            found = Loaded(function, device, binary.origin, _attributes(kernel))
            _loaded[index, kernel] = found
    return found


def _load_function(cuda: Driver, kernel: Kernel, device: Device, binary: binaries.Binary) -> ctypes.c_void_p:
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    logs = [ctypes.create_string_buffer(_LOG_BYTES) for _ in range(2)]
    names = (libcuda.INFO_LOG, libcuda.INFO_LOG_BYTES, libcuda.ERROR_LOG, libcuda.ERROR_LOG_BYTES)
    values = (ctypes.addressof(logs[0]), _LOG_BYTES, ctypes.addressof(logs[1]), _LOG_BYTES)
    where = f"for sm_{device.capability[0]}{device.capability[1]} from {binary.origin}"
    try:
        cuda.call(
            "cuModuleLoadDataEx", ctypes.byref(module), ctypes.c_char_p(binary.content),
            ctypes.c_uint(len(names)), (ctypes.c_int * 4)(*names), (ctypes.c_void_p * 4)(*values),
        )  # fmt: skip
        cuda.call("cuModuleGetFunction", ctypes.byref(function), module, kernel.name.encode())
        if kernel.shared_bytes > DEFAULT_SHARED_BYTES:
            cuda.call(
                "cuFuncSetAttribute", function, ctypes.c_int(libcuda.MAX_DYNAMIC_SHARED_BYTES),
                ctypes.c_int(kernel.shared_bytes),
            )  # fmt: skip
    except DriverError as error:
        said = "\n".join(log.value.decode(errors="replace") for log in logs if log.value)
        raise DriverError(f"{kernel} does not load {where}: {error}{': ' if said else ''}{said}") from error
    return function


def _check_fits(kernel: Kernel, device: Device) -> None:
    number = 10 * device.capability[0] + device.capability[1]
    least = int(kernel.target.removeprefix("sm_").rstrip("a"))
    exact = kernel.target.endswith("a")
    if number != least if exact else number < least:
        raise DriverError(
            f"{kernel} is for {kernel.target}{' alone' if exact else ' and later'}, device {device.index} is "
            f"sm_{number}"
        )
    if kernel.shared_bytes > device.shared_bytes_limit:
        raise DriverError(
            f"{kernel} needs {kernel.shared_bytes} bytes of shared memory in a block, device {device.index} "
            f"(sm_{number}) has {device.shared_bytes_limit}: use smaller blocks or another back-end"
        )


def _attributes(kernel: Kernel) -> Any:
    if kernel.cluster == 1:
        return None
    return (libcuda.LaunchAttribute * 1)(
        libcuda.LaunchAttribute(id=libcuda.CLUSTER_DIMENSION, x=kernel.cluster, y=1, z=1)
    )


def _pack(cuda: Driver, kernel: Kernel, args: Sequence[Argument]) -> tuple[list[Any], Any]:
    """Parameters in memory, and the array of pointers to them: 8 bytes each, tensor maps 128.

    The driver copies them during the call; what must live until then is returned with the pointers.
    """
    count = len(args)
    slots = (ctypes.c_int64 * max(count, 1))()
    base = ctypes.addressof(slots)
    pointers = (ctypes.c_void_p * max(count, 1))(*range(base, base + 8 * count, 8))
    keep: list[Any] = [slots]
    for place, value in enumerate(args):
        kind = type(value)  # compared first: asking isinstance of every kind costs a microsecond a launch
        if kind is int:
            slots[place] = value
        elif kind is float:
            ctypes.c_float.from_address(base + 8 * place).value = value
        elif value is None:
            slots[place] = 0
        elif isinstance(value, torch.Tensor):
            slots[place] = value.data_ptr()
        elif isinstance(value, TensorMap):
            encoded = ctypes.create_string_buffer(_encoded(cuda, kernel, value), libcuda.TENSOR_MAP_BYTES)
            keep.append(encoded)
            pointers[place] = ctypes.addressof(encoded)
        else:
            raise TypeError(
                f"{kernel.name}: argument {place} is a {type(value).__name__}: pass a tensor, None, an int, a float "
                "or a TensorMap"
            )
    return keep, pointers


def _encoded(cuda: Driver, kernel: Kernel, described: TensorMap) -> bytes:
    """A tensor map's 128 bytes, which depend on these values alone and are kept."""
    base = described.tensor
    shape, strides, box = described.shape, described.strides_bytes, described.box
    key = (base.data_ptr(), base.dtype, shape, strides, box, described.swizzle)
    found = _maps.get(key)
    if found is None:
        if str(base.dtype) not in libcuda.ELEMENT_TYPES:
            raise ValueError(f"{kernel.name}: TMA copies no tensors of {base.dtype}")
        space = ctypes.create_string_buffer(libcuda.TENSOR_MAP_BYTES + libcuda.TENSOR_MAP_ALIGNMENT)
        start = -ctypes.addressof(space) % libcuda.TENSOR_MAP_ALIGNMENT
        rank = len(shape)
        try:
            cuda.call(
                "cuTensorMapEncodeTiled", ctypes.c_void_p(ctypes.addressof(space) + start),
                ctypes.c_int(libcuda.ELEMENT_TYPES[str(base.dtype)]), ctypes.c_uint(rank),
                ctypes.c_void_p(base.data_ptr()), (ctypes.c_uint64 * rank)(*shape),
                (ctypes.c_uint64 * rank)(*strides), (ctypes.c_uint * rank)(*box),
                (ctypes.c_uint * rank)(*[1] * rank), ctypes.c_int(0),
                ctypes.c_int(libcuda.SWIZZLES[described.swizzle]), ctypes.c_int(libcuda.L2_PROMOTION_128B),
                ctypes.c_int(0),
            )  # fmt: skip
        except DriverError as error:
            raise DriverError(
                f"{kernel.name}: no tensor map of shape {shape}, strides {strides} bytes, box {box}, swizzle "
                f"{described.swizzle}, base at {base.data_ptr():#x} ({base.dtype}): {error}"
            ) from error
        found = space.raw[start : start + libcuda.TENSOR_MAP_BYTES]
        if len(_maps) >= _MAPS_KEPT:
            _maps.clear()
        _maps[key] = found
    return found


@contextmanager
def _relaxed_capture(cuda: Driver) -> Iterator[None]:
    """Loading allocates, which a thread whose stream is being captured is refused unless its mode is relaxed."""
    mode = ctypes.c_int(libcuda.CAPTURE_RELAXED)
    cuda.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        yield
    finally:
        cuda.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


class _Current:
    """The device's context is the thread's, inside the block."""

    __slots__ = ("cuda", "device", "pushed")

    def __init__(self, cuda: Driver, device: Device) -> None:
        self.cuda, self.device, self.pushed = cuda, device, False

    def __enter__(self) -> None:
        context = ctypes.c_void_p()
        self.cuda.library.cuCtxGetCurrent(ctypes.byref(context))
        if context.value != self.device.context:
            self.cuda.call("cuCtxPushCurrent_v2", ctypes.c_void_p(self.device.context))
            self.pushed = True

    def __exit__(self, *_: object) -> None:
        if self.pushed:
            self.cuda.library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def device_of(index: int) -> Device:
    """A device's facts; its primary context is retained once, and for good."""
    if index not in _devices:
        cuda = libcuda.driver()
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        cuda.call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(index))
        cuda.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        major, minor, shared = (
            cuda.attribute(handle.value, which)
            for which in (libcuda.CAPABILITY_MAJOR, libcuda.CAPABILITY_MINOR, libcuda.SHARED_BYTES_LIMIT)
        )
        _devices[index] = Device(index, context.value or 0, (major, minor), shared)
    return _devices[index]


def _stream(index: int) -> int:
    """Handle of torch's current stream of a device."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return int(raw(index)) if raw is not None else int(torch.cuda.current_stream(index).cuda_stream)


def _cuda_major() -> int | None:
    """Of the CUDA that torch was built with, None for the CPU."""
    return int(torch.version.cuda.split(".")[0]) if torch.version.cuda else None


def _refused(kernel: Kernel, grid: Sequence[int], found: Loaded, args: Sequence[Argument], why: str) -> str:
    """What to know about a launch that failed."""
    number = f"{found.device.capability[0]}{found.device.capability[1]}"
    return (
        f"{kernel} was not launched: {why}. Grid {tuple(grid)}, {kernel.threads} threads, {kernel.shared_bytes} bytes "
        f"of shared memory, clusters of {kernel.cluster}, device {found.device.index} (sm_{number}), code from "
        f"{found.origin}; arguments: {', '.join(map(_in_words, args))}"
    )


def _in_words(value: Argument) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"map of {value.shape}" if isinstance(value, TensorMap) else repr(value)
