"""Attention on mma.sync: every width in bf16, and the tightest in fp16, which compiles to the same registers."""

from __future__ import annotations

from megalite_kernels.native.cuda.kernel import Kernel
from megalite_kernels.native.cuda.kernels import attention
from tests.cuda_gate.gate import Case
from tests.helpers.attention_lab import STAGES

PROMISED = ("HMMA", "LDSM", "LDGSTS")
"""Tensor cores, their operands by ldmatrix, and copies past the registers."""


def _case(name: str, kernel: Kernel, *targets: str) -> Case:
    return Case(name, kernel, PROMISED, targets=targets)


def _cases(element: str, width: int) -> list[Case]:
    name = f"{element} {width}"
    before, after = (attention.forward(element, width, architecture) for architecture in (80, 90))
    made = [_case(f"attention_forward {name}", before, "sm_80")]
    made.append(_case(f"attention_forward {name} for sm_90 on", after, "sm_90a", "sm_100a"))
    if width in attention.BACKWARD_WIDTHS:
        made.append(_case(f"attention_dk_dv {name}", attention.dk_dv(element, width)))
        made.append(_case(f"attention_dq {name}", attention.dq(element, width)))
    return made


CASES = [
    *(case for width in attention.FORWARD_WIDTHS for case in _cases("bf16", width)),
    _case("attention_dk_dv fp16 128", attention.dk_dv("fp16", 128)),
    Case("attention_statistics bf16", attention.statistics("bf16"), ("LDG.E.128",)),
    *(Case(f"lab {stage.name}", stage, PROMISED if stage is STAGES[-1] else ()) for stage in STAGES),
]
