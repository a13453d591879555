"""A folder of compiled kernels that many processes, also on many machines, may use at once. Standard library only.

An entry is its SHA-256 and its content, moved into place when it is whole: a reader sees all of it or nothing, and
one that was damaged since is made again. Who makes an entry holds its lock, so that of many processes starting at
once one compiles and the others wait; where files can't be locked, several compile, and the last one's stays.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

VARIABLE = "MEGALITE_CACHE"
"""Environment variable: the folder to use instead of ~/.cache/megalite."""
_HASH_BYTES = 32


def folder() -> Path:
    """Where compiled kernels are kept: MEGALITE_CACHE, or megalite in XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser() / "cuda"
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "megalite" / "cuda"


def get_or_make(key: str, make: Callable[[], bytes]) -> tuple[bytes, bool]:
    """The entry `key`, made and kept if it isn't there, and whether it was there.

    A folder that can't be written to is no error: the entry is made for this process alone.
    """
    path = folder() / key[:2] / f"{key}.bin"
    found = _read(path)
    if found is not None:
        return found, True
    with _locked(path.with_suffix(".lock")):
        found = _read(path)  # another process may have made it while this one waited
        if found is not None:
            return found, True
        content = make()
        _write(path, content)
    return content, False


def discard(key: str) -> None:
    """Remove an entry, if it is there and may be removed."""
    with suppress(OSError):
        (folder() / key[:2] / f"{key}.bin").unlink()


def _read(path: Path) -> bytes | None:
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    content = whole[_HASH_BYTES:]
    return content if hashlib.sha256(content).digest() == whole[:_HASH_BYTES] else None


def _write(path: Path, content: bytes) -> None:
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
            partial = Path(file.name)
            file.write(hashlib.sha256(content).digest() + content)
        partial.replace(path)
    except OSError:  # read-only or full: this process has the content, later ones make it again
        if partial is not None:
            with suppress(OSError):
                partial.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of an entry; without one where there are no locks. It ends with the process that holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError:
        yield
        return
    with file:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
