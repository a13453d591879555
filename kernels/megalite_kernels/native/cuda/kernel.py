"""What a compiled CUDA kernel and its arguments are. Standard library only: `setup.py` reads this without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_90a", "sm_100a")
"""Least architectures of kernels. Code for one with an "a" runs on that architecture alone."""

MAX_THREADS = 1024
MAX_SHARED_BYTES = 227 << 10
"""Of dynamic shared memory in a block, on sm_90 and sm_100; sm_80 has 163 KiB."""
MAX_CLUSTER = 8
"""Blocks of a cluster that every sm_90 and later can run."""
MAX_GRID = (2**31 - 1, 65535, 65535)
SWIZZLES = (0, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One instance: a source file of csrc/cuda, the symbol in it, and the defines it is compiled with."""

    source: str
    """File name in csrc/cuda."""
    name: str
    """The symbol; the build defines KERNEL_<name>."""
    defines: tuple[tuple[str, str | int], ...]
    """Sorted by name; THREADS is among them."""
    threads: int
    """Of a block."""
    shared_bytes: int = 0
    """Of dynamic shared memory in a block."""
    cluster: int = 1
    """Blocks of a cluster along x."""
    target: str = "sm_80"
    """Least architecture; "sm_90a" for what only that one has."""

    def __post_init__(self) -> None:
        _require(
            1 <= self.threads <= MAX_THREADS, f"threads of a block are 1 to {MAX_THREADS}, not {self.threads}"
        )
        _require(
            0 <= self.shared_bytes <= MAX_SHARED_BYTES,
            f"a block has up to {MAX_SHARED_BYTES} bytes of shared memory, not {self.shared_bytes}",
        )
        _require(
            1 <= self.cluster <= MAX_CLUSTER, f"a cluster has 1 to {MAX_CLUSTER} blocks, not {self.cluster}"
        )
        _require(self.target in TARGETS, f"the target is one of {', '.join(TARGETS)}, not {self.target!r}")
        names = [name for name, _ in self.defines]
        _require(names == sorted(set(names)), f"defines are sorted by name, each once, not {names}")
        _require(
            ("THREADS", self.threads) in self.defines,
            f"{self.name} needs the define THREADS={self.threads}: use instance()",
        )

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(f'{name}={value}' for name, value in self.defines)})"

    @property
    def all_defines(self) -> tuple[tuple[str, str | int], ...]:
        """What the compiler is given: KERNEL_<name>, then `defines`."""
        return ((f"KERNEL_{self.name}", 1), *self.defines)


def instance(
    source: str,
    name: str,
    *,
    threads: int,
    shared_bytes: int = 0,
    cluster: int = 1,
    target: str = "sm_80",
    **defines: str | int,
) -> Kernel:
    """A `Kernel` with its defines sorted and THREADS added."""
    values = tuple(sorted({**defines, "THREADS": threads}.items()))
    return Kernel(source, name, values, threads, shared_bytes, cluster, target)


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A box copy of TMA over a tensor, as cuTensorMapEncodeTiled takes it: dims innermost first, zero fill.

    The tensor's own shape and strides don't matter: its data pointer and element type are used.
    """

    tensor: Any
    """Whose first element is the base, 16-byte aligned."""
    shape: tuple[int, ...]
    """Elements along each dim, innermost first; 1 to 5 dims."""
    strides_bytes: tuple[int, ...]
    """Of dims 1 and up (the innermost is contiguous): one less than the dims, multiples of 16."""
    box: tuple[int, ...]
    """Elements of the copied box along each dim, up to 256."""
    swizzle: int = 0
    """Bytes of the pattern that rows of the box are permuted by in shared memory: 0, 32, 64 or 128."""

    def __post_init__(self) -> None:
        rank = len(self.shape)
        _require(1 <= rank <= 5, f"a tensor map has 1 to 5 dims, not {rank}")
        _require(
            len(self.box) == rank and len(self.strides_bytes) == rank - 1,
            f"{rank} dims need {rank} box sizes and {rank - 1} strides, "
            f"not {len(self.box)} and {len(self.strides_bytes)}",
        )
        _require(
            all(1 <= size < 2**32 for size in self.shape),
            f"dims of a tensor map are 1 to 2^32 - 1, not {self.shape}",
        )
        _require(all(1 <= size <= 256 for size in self.box), f"sides of the box are 1 to 256, not {self.box}")
        _require(
            all(stride % 16 == 0 and 0 <= stride < 2**40 for stride in self.strides_bytes),
            f"strides are multiples of 16 bytes below 2^40, not {self.strides_bytes}",
        )
        _require(
            self.swizzle in SWIZZLES,
            f"the swizzle is one of {', '.join(map(str, SWIZZLES))}, not {self.swizzle}",
        )
        row = self.box[0] * self.tensor.element_size()
        _require(row % 16 == 0, f"a row of the box is a multiple of 16 bytes, not {row}")
        _require(
            self.swizzle == 0 or row <= self.swizzle,
            f"a row of the box has up to {self.swizzle} bytes with that swizzle, not {row}",
        )


Argument = Any
"""Tensor or None (a pointer), int (int64_t), float (float), or TensorMap."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_arguments(kernel: Kernel, grid: Sequence[int], args: Sequence[Argument]) -> None:
    """Raise for a grid or an argument that no launch could take; bools are refused, as C++ has none here.

    It is called at every launch: nothing is computed that isn't wrong.
    """
    if len(grid) != 3:
        raise ValueError(f"{kernel.name}: a grid has 3 sides, not {len(grid)}")
    x, y, z = grid
    if not (0 <= x <= MAX_GRID[0] and 0 <= y <= MAX_GRID[1] and 0 <= z <= MAX_GRID[2]):
        raise ValueError(f"{kernel.name}: a grid has up to {MAX_GRID} blocks, not {tuple(grid)}")
    if x % kernel.cluster:
        raise ValueError(
            f"{kernel.name}: {x} blocks along x are no multiple of its cluster of {kernel.cluster}"
        )
    for place, value in enumerate(args):
        if value is True or value is False:
            raise ValueError(f"{kernel.name}: argument {place} is a bool: pass an int")
