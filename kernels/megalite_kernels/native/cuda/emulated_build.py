"""Builds kernels for the emulator by g++, and keeps them in a folder of the user's, by the hash of all that went in."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megalite_kernels.native.cuda.kernel import Kernel

CACHE = "MEGALITE_EMULATE_CACHE"
"""Environment variable: the folder for built kernels, instead of one in the user's cache."""

# Two runtimes in one process (of two checkouts, say) must not share their state, as unique symbols would.
RUNTIME_FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wextra"]
KERNEL_FLAGS = [
    *["-std=c++17", "-O1", "-g1", "-fPIC", "-fno-exceptions", "-fno-rtti"],
    # Each load and store calls the runtime; what a GPU's compiler would not merge must not be merged here either.
    *["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"],
    *["-fno-store-merging", "-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-fno-builtin-memcmp"],
    "-Werror=frame-larger-than=200000",  # a fiber's stack has 256 KiB: csrc/emulate/fiber.h
    *[
        "-ftrack-macro-expansion=0",
        "-fmax-errors=5",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-Wno-unused-function",
        "-DMEGALITE_EMULATE=1",
    ],
]
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_WHERE = re.compile(r"@(?:0x)?([0-9a-f]+)")


class BuildError(RuntimeError):
    """g++ is missing, or refuses a kernel."""


@dataclass(frozen=True, slots=True)
class Built:
    """A loaded instance."""

    path: Path
    runtime: ctypes.CDLL
    library: ctypes.CDLL
    call: int
    """The address of the function that calls the kernel."""
    kinds: str
    """A letter per parameter: see csrc/emulate/entry.h."""


_folder: list[Path] = []


def csrc() -> Path:
    """The folder that has cuda/ and emulate/."""
    return _folder[-1] if _folder else Path(__file__).resolve().parents[4] / "csrc"


@contextlib.contextmanager
def using_sources(folder: Path) -> Iterator[None]:
    """Within, kernels are built from another copy of csrc: tests plant errors in it."""
    _folder.append(folder)
    try:
        yield
    finally:
        _folder.pop()


def load(kernel: Kernel) -> Built:
    """The instance, built unless it is there."""
    return _load(kernel, csrc())


@functools.cache
def _load(kernel: Kernel, folder: Path) -> Built:
    runtime_path = _build_runtime(folder / "emulate" / "runtime.cpp")
    path = _build_kernel(kernel, folder, runtime_path)
    runtime = ctypes.CDLL(str(runtime_path))
    runtime.emulate_translate.argtypes = [ctypes.c_void_p]
    runtime.emulate_translate.restype = ctypes.c_void_p
    library = ctypes.CDLL(str(path))
    library.emulate_kinds.restype = ctypes.c_char_p
    call = ctypes.cast(library.emulate_call, ctypes.c_void_p).value or 0
    return Built(path, runtime, library, call, library.emulate_kinds().decode())


def _build_runtime(source: Path) -> Path:
    return _build(RUNTIME_FLAGS, f'#include "emulate/{source.name}"\n', source, [], "runtime")


def _build_kernel(kernel: Kernel, folder: Path, runtime: Path) -> Path:
    source = folder / "cuda" / kernel.source
    text = (
        f'#include "emulate/device.h"\n#include "{kernel.source}"\n'
        f'#define EMULATE_KERNEL {kernel.name}\n#include "emulate/entry.h"\n'
    )
    flags = [*KERNEL_FLAGS, *(f"-D{name}={value}" for name, value in kernel.all_defines)]
    link = [str(runtime), "-Wl,-rpath,$ORIGIN"]
    return _build(flags, text, source, link, f"{source.stem}-{kernel.name}")


def _build(flags: list[str], text: str, source: Path, link: list[str], name: str) -> Path:
    """Compile `text`, which includes `source`; safe with other processes that build the same."""
    # Names but no folders: a copy of the sources, or another checkout, finds what is built.
    content = [_compiler_version(), *flags, text, *link]
    content += sorted(f"{Path(path).name}\n{body}" for path, body in _closure(source, text).items())
    key = hashlib.sha256("\0".join(content).encode()).hexdigest()[:20]
    target = _cache() / f"{name}-{key}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        unit, made = Path(scratch) / "unit.cpp", Path(scratch) / target.name
        unit.write_text(text, encoding="utf-8")
        # Linked by itself: with the flags of the compiler, libtsan would come too.
        compiled = str(unit.with_suffix(".o"))
        folders = [f"-I{folder}" for folder in _folders()]
        _run([_compiler(), *flags, *folders, "-c", str(unit), "-o", compiled], source.name)
        _run([_compiler(), "-shared", "-Wl,-z,defs", compiled, "-o", str(made), *link, "-ldl"], source.name)
        os.replace(made, target)  # whole or not at all, whoever else builds it now
    return target


def _run(command: list[str], source: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"g++ refuses {source}:\n{done.stderr[:8000]}")


def _closure(source: Path, text: str) -> dict[str, str]:
    """Text by path of all that is included with quotes, from the file that includes or from the source's folder."""
    found: dict[str, str] = {}
    todo = [(source.parent, name) for name in _INCLUDE.findall(text)]
    while todo:
        folder, name = todo.pop()
        for place in (folder, *_folders()):
            path = (place / name).resolve()
            if path.is_file():
                if str(path) not in found:
                    found[str(path)] = path.read_text(encoding="utf-8")
                    todo += [(path.parent, other) for other in _INCLUDE.findall(found[str(path)])]
                break
    return found


def _folders() -> tuple[Path, Path]:
    """Where includes are looked for."""
    return csrc(), csrc() / "cuda"


def _cache() -> Path:
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE])
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "megalite" / "emulate"


@functools.cache
def _compiler() -> str:
    found = shutil.which(os.environ.get("CXX_EMULATE", "g++"))
    if found is None:
        raise BuildError("the emulator of CUDA kernels needs g++ (GCC 10 or later), which is not in PATH")
    return found


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([_compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def with_lines(message: str, library: Path) -> str:
    """The runtime's message, its "@offset" replaced by the lines of source they stand for."""
    return _WHERE.sub(lambda match: _line(library, match.group(1)), message)


def _line(library: Path, offset: str) -> str:
    """`at file:line`, with the line that it was inlined into if that is in another file."""
    tool = shutil.which("addr2line")
    if tool is None:
        return f"at offset 0x{offset} of {library.name}"
    command = [tool, "-i", "-e", str(library), f"0x{offset}"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
    places = [Path(line.split(" ")[0]).name for line in lines if line and not line.startswith("??")]
    places = [place for place in places if not place.startswith(("device.h:", "ptx_", "unit.cpp:"))]
    if not places:
        return f"at offset 0x{offset} of {library.name}"
    within = [place for place in places[1:] if place.split(":")[0] != places[0].split(":")[0]]
    return f"at {places[0]}" + (f" (from {within[0]})" if within else "")
