"""Importing what a command needs, without the garbage collector in between."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """For imports inside the block, which make a quarter of a million objects that stay.

    Looked at again and again, meanwhile and after, they would take a fourth of what a short run takes: what exists at
    the end of the block is left out from there on (`gc.freeze`).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
