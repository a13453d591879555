"""How a kernel is launched: a static table of configurations per architecture, and the one call that uses it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
"""What the tables speak of and what is compiled ahead of time in the tests."""
TUNED = "MEGALITE_TUNED"
"""Variable with the file of configurations that `tune.tune` wrote; nothing is read where it isn't set."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Compile-time choices of one kernel on one architecture."""

    blocks: Mapping[str, int] = field(default_factory=dict)
    """`tl.constexpr` block sizes by parameter name."""
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True, slots=True)
class Table:
    """The configurations of one kernel, by the architecture from which on they hold.

    Args:
        kernel: name, unique in the package.
        entries: architecture to configuration; "default" is required, and serves what no other entry does.
    """

    kernel: str
    entries: Mapping[str, Launch]

    def pick(self) -> Launch:
        """The configuration for the current device: an override's, a tuned one where MEGALITE_TUNED names a file,
        the architecture's, an older one's, default."""
        if self.kernel in _overrides:
            return _overrides[self.kernel]
        path = os.environ.get(TUNED)
        if path and os.path.exists(path):
            tuned = read_tuned(path, os.stat(path).st_mtime_ns).get(tuned_key(self.kernel))
            if tuned is not None:
                self.check(tuned, path)
                return tuned
        name = architecture()
        if name in self.entries:
            return self.entries[name]
        if name.startswith("sm_"):
            older = [
                known for known in self.entries if known.startswith("sm_") and _number(known) <= _number(name)
            ]
            if older:
                return self.entries[max(older, key=_number)]
        return self.entries["default"]

    def check(self, launch: Launch, source: str) -> None:
        """Raise ValueError unless `launch`, out of `source`, has just the blocks that this kernel has."""
        known = set(self.entries["default"].blocks)
        if set(launch.blocks) != known:
            raise ValueError(
                f"{source} has blocks {sorted(launch.blocks)} for {self.kernel}, which takes {sorted(known)}: "
                "tune again"
            )


def tuned_key(kernel: str) -> str:
    """Under what a tuned configuration is kept: another device or compiler has other optima."""
    return f"{kernel} {architecture()} triton-{triton.__version__}"


@lru_cache(maxsize=4)
def read_tuned(path: str, modified_ns: int) -> dict[str, Launch]:
    """The configurations in a file of `tune.tune`, read again only when it was modified."""
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    return {
        key: Launch(entry["blocks"], entry["num_warps"], entry["num_stages"])
        for key, entry in content.items()
    }


_overrides: dict[str, Launch] = {}


@contextmanager
def override(kernel: str, launch: Launch) -> Iterator[None]:
    """Launch `kernel` (its table's name) with this configuration inside the block; for tuning and tests."""
    before = _overrides.get(kernel)
    _overrides[kernel] = launch
    try:
        yield
    finally:
        if before is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = before


def _number(architecture_name: str) -> int:
    return int(architecture_name.removeprefix("sm_"))


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (`TRITON_INTERPRET=1` before the first import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def architecture() -> str:
    """Of the current device: "sm_90", "gfx942", or "interpreter"."""
    if interpreted():
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


def num_processors(x: Tensor) -> int:
    """Multiprocessors of x's device, for persistent grids (4 in the interpreter: several programs, each with
    several turns, at small sizes; 132 without a device, the count of an H100)."""
    if x.device.type == "cuda":
        return int(torch.cuda.get_device_properties(x.device).multi_processor_count)
    return 4 if interpreted() else 132


def launch(
    kernel: Any,
    grid: tuple[int, ...] | Callable[..., tuple[int, ...]],
    config: Launch,
    *args: Any,
    **constants: Any,
) -> None:
    """Run a `triton.jit` kernel on the device of its first tensor, whichever device is current.

    Args:
        kernel: takes `args`, then `constants` and the blocks of `config` as `tl.constexpr` by name.
        grid: programs; an empty grid launches nothing.
        config: from `Table.pick`.
    """
    if not callable(grid) and 0 in grid:
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard:
        kernel[grid](
            *args,
            **constants,
            **config.blocks,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,  # explicit: Triton 3.10 changes the default to off
        )
