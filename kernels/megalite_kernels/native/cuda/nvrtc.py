"""Compiles a kernel for the GPU that is there with NVRTC, which comes with torch's CUDA wheels.

The sources are given as strings and need no header of the toolkit; nothing here needs a GPU or a driver.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalite_kernels.native.cuda import cache, sources
from megalite_kernels.native.cuda.kernel import Kernel

MAJORS = (13, 12)
"""Versions of the library that are looked for."""
_OWN_CODE = 9
"""From this major compute capability on, code for "sm_90a" and the like uses all that the architecture has."""


class CompileError(RuntimeError):
    """NVRTC could not compile a kernel; the message holds its log."""


@dataclass(frozen=True, slots=True)
class Nvrtc:
    """A loaded NVRTC library."""

    library: ctypes.CDLL
    path: str
    version: tuple[int, int]
    known: tuple[int, ...]
    """Architectures it compiles for, as 80, 90, ..."""


def find(first_major: int | None = None) -> Nvrtc | None:
    """The first NVRTC that loads, of `first_major` (torch's CUDA) before others; None if there is none."""
    return _find(tuple(sorted(MAJORS, key=lambda major: (major != first_major, -major))))


@functools.cache
def _find(majors: tuple[int, ...]) -> Nvrtc | None:
    for major in majors:
        for path in _candidates(major):
            found = _load(path)
            if found is not None:
                return found
    return None


def _candidates(major: int) -> Iterator[str]:
    """Packages of NVIDIA beside torch, then CUDA's own folder, then what the system's loader finds."""
    name = f"libnvrtc.so.{major}"
    for entry in sys.path:
        for folder in (f"cu{major}", "cuda_nvrtc"):
            path = Path(entry or ".") / "nvidia" / folder / "lib" / name
            if path.is_file():
                yield str(path)
    homes = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    for home in (*filter(None, homes), "/usr/local/cuda"):
        for folder in ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            path = Path(home) / folder / name
            if path.is_file():
                yield str(path)
    yield name


def _load(path: str) -> Nvrtc | None:
    try:
        # NVRTC opens its built-ins by name when it compiles and may not look beside itself: loaded, they are found.
        for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*") if "/" in path else ()):
            ctypes.CDLL(str(builtins))
        library = ctypes.CDLL(path)
        for name in ("nvrtcCreateProgram", "nvrtcGetCUBIN", "nvrtcGetSupportedArchs"):
            getattr(library, name)
    except (OSError, AttributeError):
        return None
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)):
        return None
    if library.nvrtcGetNumSupportedArchs(ctypes.byref(count)):
        return None
    known = (ctypes.c_int * count.value)()
    if library.nvrtcGetSupportedArchs(known):
        return None
    return Nvrtc(library, path, (major.value, minor.value), tuple(known))


def architecture(kernel: Kernel, capability: tuple[int, int], known: Sequence[int]) -> str:
    """What to compile a kernel for: "sm_90a" for (9, 0); "compute_90", PTX, where NVRTC is older than the GPU.

    Raises:
        CompileError: this NVRTC can't compile the kernel for that GPU in any way.
    """
    major, minor = capability
    number = 10 * major + minor
    if number in known:
        return f"sm_{number}{'a' if major >= _OWN_CODE else ''}"
    older = [one for one in known if one < number]
    if kernel.target in sources.PTX and older and max(older) >= int(sources.PTX[kernel.target]):
        return f"compute_{max(older)}"
    raise CompileError(
        f"{kernel.name} needs code for sm_{number} itself, which this NVRTC does not know (it knows "
        f"{', '.join(map(str, known))}): install a newer torch or nvidia-cuda-nvrtc"
    )


def compiled(kernel: Kernel, capability: tuple[int, int], nvrtc: Nvrtc) -> tuple[bytes, bool]:
    """The cubin (or PTX) of a kernel for a compute capability, and whether the disk cache had it.

    Raises:
        CompileError: NVRTC refused; the message holds its log.
    """
    chosen = architecture(kernel, capability, nvrtc.known)
    return cache.get_or_make(cache_key(kernel, chosen, nvrtc), lambda: compile_kernel(kernel, chosen, nvrtc))


def cache_key(kernel: Kernel, chosen: str, nvrtc: Nvrtc) -> str:
    """Of sources, defines, options, architecture and NVRTC's version."""
    content = f"{sources.identity(kernel)} {chosen} {nvrtc.version}"
    return hashlib.sha256(content.encode()).hexdigest()


def compile_kernel(kernel: Kernel, chosen: str, nvrtc: Nvrtc) -> bytes:
    """Run NVRTC: the cubin for "sm_...", the PTX for "compute_...".

    Raises:
        CompileError: it refused; the message holds its log.
    """
    texts = sources.closure(kernel.source)
    headers = [name for name in texts if name != kernel.source]
    count = len(headers)
    program = ctypes.c_void_p()
    library = nvrtc.library
    status = library.nvrtcCreateProgram(
        ctypes.byref(program),
        texts[kernel.source].encode(),
        kernel.source.encode(),
        count,
        (ctypes.c_char_p * count)(*(texts[name].encode() for name in headers)),
        (ctypes.c_char_p * count)(*(name.encode() for name in headers)),
    )
    if status:
        raise CompileError(f"{kernel}: NVRTC could not begin: {_message(nvrtc, status)}")
    try:
        options = [*sources.OPTIONS, f"-arch={chosen}", *sources.define_options(kernel)]
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), encoded)
        if status:
            raise CompileError(
                f"{kernel}: NVRTC {nvrtc.version[0]}.{nvrtc.version[1]} ({nvrtc.path}) could not compile it with "
                f"{' '.join(options)}: {_message(nvrtc, status)}\n{_take(nvrtc, program, 'ProgramLog').decode()}"
            )
        return _take(nvrtc, program, "CUBIN" if chosen.startswith("sm_") else "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _take(nvrtc: Nvrtc, program: ctypes.c_void_p, what: str) -> bytes:
    """One of a program's results: ProgramLog, CUBIN or PTX; texts without the zero at their end."""
    size = ctypes.c_size_t()
    status = getattr(nvrtc.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    content = ctypes.create_string_buffer(max(size.value, 1))
    status = status or getattr(nvrtc.library, f"nvrtcGet{what}")(program, content)
    if status:
        raise CompileError(f"NVRTC has no {what}: {_message(nvrtc, status)}")
    return content.raw[: size.value] if what == "CUBIN" else content.value


def _message(nvrtc: Nvrtc, status: int) -> str:
    text: bytes = nvrtc.library.nvrtcGetErrorString(status) or b"unknown error"
    return text.decode()
