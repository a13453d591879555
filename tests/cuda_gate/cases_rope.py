"""Rotary embedding of heads of 64 and 128 features, whole and in part, in halves and interleaved."""

from __future__ import annotations

from megalite_kernels.native.cuda.kernels.rope import rope_kernel
from tests.cuda_gate.gate import Case

WIDE = ("LDG.E.128", "STG.E.128")


def _case(name: str, text: str, element: str, weight: str, dim: int, half: int, **options: bool) -> Case:
    kernel = rope_kernel(name, element, weight, dim=dim, half=half, **options)
    required = WIDE if options["aligned"] else ()
    sums = () if name == "rope_forward" else ("SHFL",)
    return Case(f"{name} {text}", kernel, (*required, *sums))


CASES = [
    _case(name, text, element, weight, dim, half, interleaved=interleaved, aligned=aligned)
    for text, element, weight, dim, half, interleaved, aligned in (
        ("128 bf16", "bf16", "bf16", 128, 64, False, True),
        ("128 bf16 interleaved, partial", "bf16", "float", 128, 16, True, True),
        ("256 float", "float", "float", 256, 128, False, True),
        ("80 fp16 unaligned", "fp16", "fp16", 80, 10, False, False),
    )
    for name in ("rope_forward", "rope_norm_forward", "rope_norm_backward")
]
