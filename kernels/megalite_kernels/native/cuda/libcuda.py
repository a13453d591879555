"""NVIDIA's driver library by dlopen: the few functions that loading and launching need, and their errors."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

NAMES = ("libcuda.so.1", "libcuda.so")

# Values of cuda.h.
MAX_DYNAMIC_SHARED_BYTES, NON_PORTABLE_CLUSTER = 8, 14  # CUfunction_attribute
SHARED_BYTES_LIMIT, CAPABILITY_MAJOR, CAPABILITY_MINOR = 97, 75, 76  # CUdevice_attribute
INFO_LOG, INFO_LOG_BYTES, ERROR_LOG, ERROR_LOG_BYTES = 3, 4, 5, 6  # CUjit_option
CLUSTER_DIMENSION = 4  # CUlaunchAttributeID
CAPTURE_RELAXED = 2  # CUstreamCaptureMode
ELEMENT_TYPES = {  # CUtensorMapDataType
    "torch.uint8": 0,
    "torch.int32": 3,
    "torch.int64": 5,
    "torch.float16": 6,
    "torch.float32": 7,
    "torch.float64": 8,
    "torch.bfloat16": 9,
}
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle
L2_PROMOTION_128B = 2  # CUtensorMapL2promotion
TENSOR_MAP_BYTES, TENSOR_MAP_ALIGNMENT = 128, 64

_FUNCTIONS = (
    "cuInit", "cuDriverGetVersion", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain",
    "cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuModuleLoadDataEx",
    "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernelEx", "cuTensorMapEncodeTiled",
    "cuThreadExchangeStreamCaptureMode", "cuGetErrorName", "cuGetErrorString",
)  # fmt: skip


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute, as far as clusters need it."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("x", ctypes.c_uint),
        ("y", ctypes.c_uint),
        ("z", ctypes.c_uint),
        ("rest", ctypes.c_char * 52),
    )


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


class DriverError(RuntimeError):
    """A function of the driver failed."""


class Driver:
    """The functions of a loaded libcuda; `call` raises with the driver's own words."""

    def __init__(self, library: Any) -> None:
        missing = [name for name in _FUNCTIONS if not hasattr(library, name)]
        if missing:
            raise DriverError(
                f"NVIDIA's driver lacks {', '.join(missing)}: it is older than CUDA 12; update the driver"
            )
        self.library = library
        self.call("cuInit", ctypes.c_uint(0))

    def call(self, name: str, *args: Any) -> None:
        """Call a function; raise DriverError if it doesn't return CUDA_SUCCESS."""
        status = getattr(self.library, name)(*args)
        if status:
            raise DriverError(f"{name}: {self.message(status)}")

    def message(self, status: int) -> str:
        """The driver's name and text of an error."""
        parts = []
        for function in (self.library.cuGetErrorName, self.library.cuGetErrorString):
            text = ctypes.c_char_p()
            if function(ctypes.c_int(status), ctypes.byref(text)) == 0 and text.value:
                parts.append(text.value.decode(errors="replace"))
        return f"{': '.join(parts) or 'unknown error'} ({status})"

    def version(self) -> tuple[int, int]:
        """Of CUDA that this driver supports, as (13, 0)."""
        number = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(number))
        return number.value // 1000, number.value % 1000 // 10

    def attribute(self, device: int, which: int) -> int:
        """An attribute of a device."""
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(which), ctypes.c_int(device))
        return value.value


@functools.cache
def driver() -> Driver:
    """NVIDIA's driver, loaded once.

    Raises:
        DriverError: there is none, it is too old, or it does not start.
    """
    problems = []
    for name in NAMES:
        try:
            return Driver(ctypes.CDLL(name))
        except OSError as error:
            problems.append(str(error))
    raise DriverError(f"NVIDIA's driver is not installed ({problems[0]})")
