"""RMSNorm and LayerNorm of any codebase: modules of one vector of gains, recognised by what they compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalite_kernels.ops.layer_norm import layer_norm
from megalite_kernels.ops.rms_norm import rms_norm
from megalite_kernels.patching.check import Inputs, random_input
from megalite_kernels.patching.common import Proposal, floats_named, plain, takes_one_input
from megalite_kernels.patching.swap import Methods, Spec, one_input
from megalite_kernels.reference.common import wide_dtype

USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12, 0.0)
"""Tried where the module keeps its eps in no attribute."""

DTYPE_EPS = -1.0
"""Stands for torch's `eps=None`: the spacing at 1 of the dtype that torch computes in."""

ROWS = 24


@dataclass(frozen=True)
class RMSNormSpec(Spec):
    """`rms_norm` with the module's weight."""

    eps: float
    zero_centered: bool

    def methods(self, cls: type[nn.Module]) -> Methods:
        def norm(module: nn.Module, x: Tensor) -> Tensor | None:
            weight = module.weight
            if not plain(x, weight):  # type: ignore[arg-type]
                return None
            # A 32-bit gain on a 16-bit row gives 32 bits where the gain is applied last, as in Llama's.
            if not self.zero_centered:
                x = x.to(torch.promote_types(x.dtype, weight.dtype))  # type: ignore[arg-type]
            return rms_norm(x, weight, _eps(self.eps, x), zero_centered=self.zero_centered)  # type: ignore[arg-type]

        return {"forward": one_input(norm, cls.forward)}


@dataclass(frozen=True)
class LayerNormSpec(Spec):
    """`layer_norm` with the module's weight and, if it has one, bias."""

    eps: float

    def methods(self, cls: type[nn.Module]) -> Methods:
        def norm(module: nn.Module, x: Tensor) -> Tensor | None:
            weight, bias = module.weight, getattr(module, "bias", None)
            if not plain(x, weight, bias):  # type: ignore[arg-type]
                return None
            x = x.to(torch.promote_types(x.dtype, weight.dtype))  # type: ignore[arg-type]
            return layer_norm(x, weight, bias, _eps(self.eps, x))  # type: ignore[arg-type]

        return {"forward": one_input(norm, cls.forward)}


def _eps(eps: float, x: Tensor) -> float:
    return torch.finfo(wide_dtype(x)).eps if eps == DTYPE_EPS else eps


def propose(module: nn.Module) -> Proposal | None:
    """A norm is a leaf of one input with a vector `weight`, perhaps a vector `bias`, and no other state."""
    parameters = dict(module.named_parameters())
    if not {"weight"} <= set(parameters) <= {"weight", "bias"} or len(list(module.modules())) > 1:
        return None
    weight = parameters["weight"]
    if any(p.dim() != 1 or p.shape != weight.shape for p in parameters.values()) or list(module.buffers()):
        return None
    if not weight.is_floating_point() or not takes_one_input(module):
        return None
    found = sorted({value for value in floats_named(module, "eps") if 0 <= value < 0.1})
    candidates = tuple(found) or ((DTYPE_EPS,) if _has_no_eps(module) else USUAL_EPS)
    hypotheses: tuple[Spec, ...] = tuple(LayerNormSpec(eps) for eps in candidates)
    kind = "layer_norm"
    if "bias" not in parameters:
        kind = "layer_norm" if isinstance(module, nn.LayerNorm) else "rms_norm"
        rms = (RMSNormSpec(eps, zero_centered) for eps in candidates for zero_centered in (False, True))
        hypotheses = (*rms, *hypotheses)
    return Proposal(
        kind,
        hypotheses,
        (rows_of_all_sizes(module, weight.shape[0]),),
        kinds={s: "rms_norm" if isinstance(s, RMSNormSpec) else "layer_norm" for s in hypotheses},
        quiet=isinstance(module, nn.PReLU),
    )


def _has_no_eps(module: nn.Module) -> bool:
    return "eps" in vars(module) and module.eps is None


def rows_of_all_sizes(module: nn.Module, hidden: int) -> Inputs:
    """Random rows from 1e-4 to 10 in size: a wrong eps shows in the small ones only."""
    steps = torch.linspace(-4, 1, ROWS)

    def inputs(dtype: torch.dtype) -> tuple[tuple[Tensor], dict[str, object]]:
        x = random_input(module, ROWS, hidden)
        sizes = 10.0 ** steps.to(x.device)
        # Rounded to the coarsest dtype first, so that runs in different dtypes see the same numbers.
        return ((x * sizes[:, None]).bfloat16().to(dtype).unsqueeze(0),), {}

    return inputs
