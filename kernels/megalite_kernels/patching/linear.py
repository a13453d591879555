"""Projections on a CPU: torch's Linear and GPT-2's Conv1D, where the native library's products are the faster ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalite_kernels.backend import choose
from megalite_kernels.ops.linear import linear, may_be_ours
from megalite_kernels.patching.check import random_input
from megalite_kernels.patching.common import Proposal, plain
from megalite_kernels.patching.loss import HeadSpec
from megalite_kernels.patching.swap import Methods, Spec, layers, one_input

LEAST_WEIGHT = 1 << 14
"""Elements below which a weight's products cost about as much as the calls: 128 x 128, with 2,048 tokens 67 MFLOP."""

TOKENS = 2048
"""Rows for which the products are asked after; each call then decides for its own."""

ROWS = 17
"""Of the check: enough to tell another function, and in float32 too few for the native library, whose accuracy the ops'
own tests hold."""


@dataclass(frozen=True)
class LinearSpec(Spec):
    """`linear` with the module's weight and, if it has one, bias."""

    transposed: bool
    """Whether the weight is [in, out], as Conv1D keeps it."""

    def methods(self, cls: type[nn.Module]) -> Methods:
        def project(module: nn.Module, x: Tensor) -> Tensor | None:
            weight: Tensor = module.weight.t() if self.transposed else module.weight  # type: ignore[operator,assignment]
            bias = getattr(module, "bias", None)
            return linear(x, weight, bias=bias) if _fits(x, weight, bias) else None

        return {"forward": one_input(project, cls.forward)}


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` takes the call; the original gives its own error, and under autocast keeps converted weights."""
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    if len(dtypes) > 1 or weight.device != x.device or not may_be_ours(x, weight, bias):
        return False
    return x.shape[-1:] == weight.shape[1:]


def propose(module: nn.Module) -> Proposal | None:
    """A module of one of the two classes themselves: what is derived from them may do more."""
    cls, specs = layers(module)
    transposed = cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
    weight = getattr(module, "weight", None)
    if (cls is not nn.Linear and not transposed) or not isinstance(weight, Tensor) or not plain(weight):
        return None
    # Over a head that gives lazy logits it would make them; patch puts it below (`_head`).
    if HeadSpec() in specs or weight.device.type != "cpu" or not gains(weight):
        return None
    features = weight.shape[0 if transposed else 1]

    def inputs(dtype: torch.dtype) -> tuple[tuple[Tensor], dict[str, object]]:
        return (random_input(module, 1, ROWS, features).bfloat16().to(dtype),), {}

    return Proposal("linear", (LinearSpec(transposed),), (inputs,), quiet=True)


def gains(weight: Tensor) -> bool:
    """Whether one of the three products of a step with this weight would be the native library's."""
    if weight.numel() < LEAST_WEIGHT:
        return False
    probe = weight.new_empty(1, 1)
    try:
        chosen = choose("linear_fwd", "cpu", (probe, probe, None))
    except ValueError:  # a back-end is forced that has no product
        return False
    if chosen is functional.linear:
        return False
    from megalite_kernels.native.linear import wins, wins_weight_gradient  # needs the library, which is there

    (rows, cols), dtype = weight.shape, weight.dtype
    return (
        wins(dtype, TOKENS, rows, cols)
        or wins(dtype, TOKENS, cols, rows)
        or wins_weight_gradient(dtype, rows, cols, TOKENS)
    )
