"""The instances of LayerNorm's kernels, csrc/cuda/layer_norm.cuh."""

from __future__ import annotations

from megalite_kernels.native.cuda.kernel import Kernel
from megalite_kernels.native.cuda.kernels import rows
from megalite_kernels.native.cuda.kernels.rows import Rows

SOURCE = "layer_norm.cuh"


def forward_kernel(element: str, weight: str, *, hidden: int, aligned: bool) -> tuple[Kernel, Rows]:
    """Of `layer_norm_fwd` and `layer_norm_residual_fwd`."""
    return rows.forward_kernel(SOURCE, "layer_norm_forward", element, weight, hidden=hidden, aligned=aligned)


def backward_kernels(
    element: str, weight: str, *, hidden: int, aligned: bool
) -> tuple[Kernel, Rows, Kernel | None]:
    """Of `layer_norm_bwd`: the kernel, how rows (or their stripes) lie, and what sums over rows that are too long."""
    table = rows.backward_table(element, weight, rows.run_of(element, aligned), centered=True)
    found = rows.shortest(table, hidden)
    means = None
    if found is None:
        found = rows.BACKWARD_LONG
        means = rows.row_kernel(
            SOURCE, "layer_norm_backward_means", element, weight, rows.MEANS_LONG, aligned
        )
    kernel = rows.row_kernel(SOURCE, "layer_norm_backward", element, weight, found, aligned, partial=True)
    return kernel, found, means


SHIPPED = [
    kernel
    for hidden in (1024, 2048, 4096, 8192, 16384)
    for kernel in (
        forward_kernel("bf16", "bf16", hidden=hidden, aligned=True)[0],
        backward_kernels("bf16", "bf16", hidden=hidden, aligned=True)[0],
    )
]
"""Hidden sizes of models that are trained; the others are compiled where they are used."""
