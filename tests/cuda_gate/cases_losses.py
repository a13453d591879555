"""The losses at the vocabularies of training, AdamW and the gradient norm."""

from __future__ import annotations

from megalite_kernels.native.cuda.kernels import adamw, cross_entropy, grad_norm, scaled_copy
from tests.cuda_gate.gate import Case

VECTORS = ("LDG.E.128", "STG.E.128")
"""Of 16 bytes, read and written."""
COPIES = ("LDGSTS.E.BYPASS.128", "STG.E.128")
"""Read past the registers."""


def _gradients(element: str) -> list[Case]:
    """GPT-2's vocabulary in one block's shared memory, Llama 3's in a cluster's, and a row that is read twice."""
    small, middle, large = (
        cross_entropy.gradient(element, cols, 227 << 10, clusters=clusters)[0]
        for cols, clusters in ((16032, False), (128256, True), (1 << 20, False))
    )
    return [
        Case(f"cross_entropy_grad {element}, kept", small, COPIES),
        Case(f"cross_entropy_grad {element}, kept by a cluster", middle, (*COPIES, "UCGABAR_ARV")),
        Case(f"cross_entropy_grad {element}, read twice", large, VECTORS),
    ]


CASES = [
    *(
        case
        for element in cross_entropy.ELEMENTS
        for case in (
            Case(f"cross_entropy_forward {element}", cross_entropy.forward(element), VECTORS[:1]),
            Case(f"cross_entropy_backward {element}", cross_entropy.backward(element), VECTORS),
            *_gradients(element),
        )
    ),
    *(Case(str(kernel), kernel, ("LDG.E.128", "STG.E.128")) for kernel in adamw.SHIPPED),
    *(Case(str(kernel), kernel, ("LDG.E.128",)) for kernel in scaled_copy.SHIPPED),
    *(
        Case(f"grad_norm_partial {element}", grad_norm.partial(element), ("LDG.E.128", "DFMA"))
        for element in cross_entropy.ELEMENTS
    ),
    Case("grad_norm_total", grad_norm.total(), ("DADD",)),
]
