"""Attention on Hopper: every kernel for both head dims in bf16, and what fp16 changes (nothing) once for each kernel.

HGMMA is wgmma, UTMALDG a TMA load, USETMAXREG the division of registers between producer and consumers, SYNCS an
operation on an mbarrier, STSM stmatrix.
"""

from __future__ import annotations

from megalite_kernels.native.cuda.kernels import attention_hopper as kernels
from tests.cuda_gate.gate import Case

REQUIRED = ("HGMMA", "UTMALDG", "USETMAXREG", "SYNCS", "STSM", "STG.E.128")

CASES = [
    Case(f"attention_hopper_{name} dim {dim} {element}", make(element, dim), REQUIRED)
    for name, make in (("forward", kernels.forward), ("dk_dv", kernels.dk_dv), ("dq", kernels.dq))
    for element, dim in (("bf16", 64), ("bf16", 128), ("fp16", 128))
]
