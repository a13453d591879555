"""Opt-in tuning: measure configurations of a kernel on this device, and keep the fastest in a file.

    MEGALITE_TUNED=tuned.json python my_tuning.py     # calls tune(...), which writes the file
    MEGALITE_TUNED=tuned.json python train.py         # Table.pick reads it; without the variable nothing does

Entries are by kernel, architecture and Triton version: another device or compiler falls back to the static tables.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import triton
from triton.runtime.errors import TritonError

from megalite_kernels import timing
from megalite_kernels.triton.launch import TUNED, Launch, Table, interpreted, override, tuned_key

Measure = Callable[..., Mapping[str, timing.Timing]]


def tune(
    table: Table,
    candidates: Sequence[Launch],
    run: Callable[[], object],
    *,
    path: str | os.PathLike[str] | None = None,
    measure: Measure = timing.measure,
) -> Launch:
    """Time `run` under each candidate and under the present choice, store the fastest, and return it.

    Args:
        table: of the kernel that `run` launches, such as `megalite_kernels.triton.rope.FORWARD`.
        candidates: at least one; `neighbours` gives some. Those that don't compile or fit the device are passed over.
        run: calls the op at the shapes that matter; it runs many times, so writing ops get buffers of their own.
        path: the file to write into; None takes the variable MEGALITE_TUNED.
        measure: called with variants by name, as `timing.measure`, with cold caches and CUDA graphs on a GPU.

    Returns:
        The configuration with the smallest median; the present one where none is faster.

    Raises:
        ValueError: no candidate, no file named, or blocks that the kernel doesn't have.
        RuntimeError: not even the present configuration runs.
    """
    target = path if path is not None else os.environ.get(TUNED)
    if not target:
        raise ValueError(f"path=None and {TUNED} is not set: name the file to keep the choice in")
    if not candidates:
        raise ValueError("candidates is empty: pass at least one Launch")
    for candidate in candidates:
        table.check(candidate, "a candidate")
    present = table.pick()
    tried = {"present": present} | {str(i): c for i, c in enumerate(candidates) if c != present}
    failures: dict[str, str] = {}
    variants = {name: _under(table, launch, run) for name, launch in tried.items()}
    for name, variant in list(variants.items()):
        try:
            variant()
        except (TritonError, RuntimeError) as error:
            failures[name] = str(error)
            del variants[name]
    if "present" in failures:
        raise RuntimeError(f"{table.kernel} does not run as it is: {failures['present']}")
    options = {} if interpreted() else {"device": "cuda", "cold": True, "graphs": True}
    times = measure(variants, **options)
    best = min(times, key=lambda name: times[name].median_ms)
    _store(Path(target), table, tried[best], times[best].median_ms)
    return tried[best]


def neighbours(launch: Launch) -> list[Launch]:
    """Half and double the warps, one stage fewer and more, and each block halved and doubled: one change at a time."""
    found = [Launch(launch.blocks, warps, launch.num_stages) for warps in _around(launch.num_warps, 32)]
    found += [
        Launch(launch.blocks, launch.num_warps, stages)
        for stages in (launch.num_stages - 1, launch.num_stages + 1)
        if stages > 0
    ]
    for name, size in launch.blocks.items():
        found += [
            Launch({**launch.blocks, name: other}, launch.num_warps, launch.num_stages)
            for other in _around(size, 1 << 16)
        ]
    return found


def _around(value: int, limit: int) -> list[int]:
    return [other for other in (value // 2, value * 2) if 1 <= other <= limit]


def _under(table: Table, launch: Launch, run: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        with override(table.kernel, launch):
            return run()

    return call


def _store(path: Path, table: Table, launch: Launch, median_ms: float) -> None:
    """Put the entry into the file, whole or not at all: others may be reading it."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content[tuned_key(table.kernel)] = {
        "blocks": dict(launch.blocks),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "median_ms": median_ms,
        "device": "interpreter" if interpreted() else torch.cuda.get_device_name(),
        "triton": triton.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    scratch.replace(path)
