"""Ways to call every op: what tests, doctor and benchmarks check and time, each with its floor.

A new op adds its cases to the file it belongs to; nothing else needs to know.
"""

from __future__ import annotations

from megalite_kernels.cases import attention, fp8, fp8_fused, losses, optimizer, rowwise
from megalite_kernels.cases.base import Case

CASES: dict[str, Case] = {
    case.name: case
    for cases in (rowwise.CASES, attention.CASES, losses.CASES, fp8.CASES, fp8_fused.CASES, optimizer.CASES)
    for case in cases
}


def cases_of(op: str) -> list[Case]:
    """The cases of a public op, in order; the first one is the plainest."""
    return [case for case in CASES.values() if case.op == op]
