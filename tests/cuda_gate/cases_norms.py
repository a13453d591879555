"""The norms at training shapes: every kernel, and both sides of each limit on the length of a row; and their lab."""

from __future__ import annotations

from megalite_kernels.native.cuda.kernel import Kernel
from megalite_kernels.native.cuda.kernels import layer_norm, rms_norm
from megalite_kernels.native.cuda.kernels.rows import sum_kernel
from tests.cuda_gate.gate import Case
from tests.helpers.rms_norm_lab import STAGES

WIDE = ("LDG.E.128", "STG.E.128")
"""16 bytes a lane: what the aligned kernels are for."""


def _kernels(op: str, element: str, weight: str, hidden: int, aligned: bool) -> list[tuple[str, Kernel]]:
    module = rms_norm if op == "rms_norm" else layer_norm
    forward, _ = module.forward_kernel(element, weight, hidden=hidden, aligned=aligned)
    backward, _, means = module.backward_kernels(element, weight, hidden=hidden, aligned=aligned)
    found = [("forward", forward), ("backward", backward)]
    return found if means is None else [*found, ("means", means)]


def _cases(op: str, element: str, weight: str, hidden: int, aligned: bool) -> list[Case]:
    name = f"{op} {hidden} {element}{'' if aligned else ' unaligned'}"
    name += "" if weight == element else f" {weight} weight"
    cases = []
    for what, kernel in _kernels(op, element, weight, hidden, aligned):
        stores = what != "means"
        required = (WIDE if stores else WIDE[:1]) if aligned else ()
        cases.append(Case(f"{name} {what}", kernel, (*required, "SHFL")))
    return cases


CASES = [
    case
    for op, element, weight, hidden, aligned in (
        ("rms_norm", "bf16", "bf16", 128, True),
        ("layer_norm", "bf16", "bf16", 1024, True),
        ("rms_norm", "bf16", "bf16", 4096, True),
        ("rms_norm", "float", "float", 8192, True),
        ("layer_norm", "bf16", "float", 8192, True),
        ("layer_norm", "float", "float", 8192, True),
        ("rms_norm", "fp16", "fp16", 4095, False),
        ("layer_norm", "bf16", "bf16", 4095, False),
        ("rms_norm", "bf16", "bf16", 16384, True),
        ("layer_norm", "bf16", "bf16", 65536, True),
        ("rms_norm", "bf16", "float", 65535, False),
    )
    for case in _cases(op, element, weight, hidden, aligned)
]
CASES += [Case("sum_partials bf16", sum_kernel("bf16"))]
CASES += [
    Case(f"lab {kernel.name}", kernel, WIDE if kernel.name.endswith("vectors") else ()) for kernel in STAGES
]
