"""Activations of the MLP: swiglu, geglu, gelu, relu². The backward recomputes them from the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from megalite_kernels._library import define
from megalite_kernels.backend import register, register_lazy
from megalite_kernels.ops import checks
from megalite_kernels.ops.native_support import NATIVE, native_supports
from megalite_kernels.ops.triton_support import TRITON, triton_supports
from megalite_kernels.reference import activation as reference

Again = Callable[[Tensor], None]
"""Takes an output that a backward pass has made again."""


def swiglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    again: Again | None = None,
    in_place: bool = False,
) -> Tensor:
    """`silu(gate) * up`, with silu(x) = x * sigmoid(x), computed in float32 and rounded once.

    Args:
        gate: [..., F]; or, without `up`, both in one tensor [..., 2F], gate first.
        up: like gate.
        bias: [2F], added to (gate, up) first.
        again: called in the backward pass with the output, which that makes again (the same bits): who needs it for
            a gradient, as the weights' of the layer after this, need not keep it. Only without `up`.
        in_place: with `again`, on CPUs: the output is made again where its gradient stands, and the gradient of what
            was given is written over that, all in one pass of a fifth more bytes. Only where nobody else has either,
            as between two products; an addition hands one gradient to both its operands. The graph takes one
            backward pass.

    Returns:
        [..., F] like gate, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices don't fit together, both `up` and `again` are given, or `in_place`
            without `again`.
        RuntimeError: in the second of two backward passes with `in_place`.

    Saved: gate and up.
    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    return _gated(gate, up, bias, "silu", again, in_place)


def geglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    approximate: str = "tanh",
    again: Again | None = None,
    in_place: bool = False,
) -> Tensor:
    """`gelu(gate) * up`; arguments as in `swiglu`, `approximate` as in `gelu`."""
    return _gated(gate, up, bias, _gelu_kind(approximate), again, in_place)


def gelu(
    x: Tensor,
    *,
    bias: Tensor | None = None,
    approximate: str = "tanh",
    again: Again | None = None,
    in_place: bool = False,
) -> Tensor:
    """`x * Phi(x)`, Phi being the normal distribution function, computed in float32 and rounded once.

    Args:
        x: any shape [..., F].
        bias: [F], added to x first.
        approximate: "tanh" (GPT-2's `gelu_new`) or "none" (exact).
        again, in_place: the output is made again in the backward pass; see `swiglu`.

    Raises:
        ValueError: shapes, dtypes or devices don't fit together, or `approximate` is not known.

    Saved: x (with its bias).
    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    return _plain(x, bias, _gelu_kind(approximate), again, in_place)


def relu_squared(
    x: Tensor, *, bias: Tensor | None = None, again: Again | None = None, in_place: bool = False
) -> Tensor:
    """`max(x, 0)^2`; arguments as in `gelu`. Source: So et al., "Primer", 2021."""
    return _plain(x, bias, "relu2", again, in_place)


def _gelu_kind(approximate: str) -> str:
    checks.require_option(approximate, ("tanh", "none"), "approximate")
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def _plain(x: Tensor, bias: Tensor | None, kind: str, again: Again | None, in_place: bool) -> Tensor:
    checks.require_float(x=x)
    _require_again(again, in_place)
    if bias is not None:
        checks.require_shape(bias, (x.shape[-1],), "bias", f"x with {x.shape[-1]} features")
        checks.require_same_kind(bias, x, "bias", "x")
        x = x + bias
    return _Activation.apply(x, kind, again, in_place)


def _gated(
    gate: Tensor, up: Tensor | None, bias: Tensor | None, kind: str, again: Again | None, in_place: bool
) -> Tensor:
    checks.require_float(gate=gate)
    _require_again(again, in_place)
    features = gate.shape[-1] * 2 if up is not None else gate.shape[-1]
    if bias is not None:
        checks.require_shape(bias, (features,), "bias", f"gate and up with {features} features together")
        checks.require_same_kind(bias, gate, "bias", "gate")
    if up is not None:
        if again is not None:
            raise ValueError(
                "again goes with gate and up in one tensor [..., 2F], and up is a tensor of its own"
            )
        checks.require_like(up, gate, "up", "gate")
        if bias is not None:
            gate, up = gate + bias[: features // 2], up + bias[features // 2 :]
        return _GatedPair.apply(gate, up, kind)
    if features % 2:
        raise ValueError(f"gate has {features} features: a packed [gate, up] tensor needs an even number")
    packed = gate if bias is None else gate + bias
    return _GatedPacked.apply(packed, kind, again, in_place)


def _require_again(again: Again | None, in_place: bool) -> None:
    if in_place and again is None:
        raise ValueError("in_place=True goes with again=, which takes the output that is made again")


def packed_forward(packed: Tensor, kind: str) -> Tensor:
    """Reference of `glu_fwd`."""
    gate, up = packed.chunk(2, dim=-1)
    return reference.gated_forward(gate, up, kind).contiguous()


def packed_backward(dy: Tensor, packed: Tensor, kind: str) -> Tensor:
    """Reference of `glu_bwd`."""
    gate, up = packed.chunk(2, dim=-1)
    return torch.cat(reference.gated_backward(dy, gate, up, kind), dim=-1)


def backward_again_(dy: Tensor, x: Tensor, kind: str) -> None:
    """Reference of `activation_bwd_again_`: dy becomes y, and x becomes dx."""
    dx, y = reference.backward(dy, x, kind), reference.forward(x, kind)
    dy.copy_(y)
    x.copy_(dx)


def packed_backward_again_(dy: Tensor, packed: Tensor, kind: str) -> None:
    """Reference of `glu_bwd_again_`: dy becomes y, and packed becomes dpacked."""
    dpacked, y = packed_backward(dy, packed, kind), packed_forward(packed, kind)
    dy.copy_(y)
    packed.copy_(dpacked)


def _fake_packed_forward(packed: Tensor, kind: str) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2))


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_activation_forward = define("activation_fwd(Tensor x, str kind) -> Tensor", fake=lambda x, kind: _like(x))
_activation_backward = define(
    "activation_bwd(Tensor dy, Tensor x, str kind) -> Tensor", fake=lambda dy, x, kind: _like(x)
)
_packed_forward = define("glu_fwd(Tensor packed, str kind) -> Tensor", fake=_fake_packed_forward)
_packed_backward = define(
    "glu_bwd(Tensor dy, Tensor packed, str kind) -> Tensor", fake=lambda dy, packed, kind: _like(packed)
)
_backward_again_ = define(
    "activation_bwd_again_(Tensor(a!) dy, Tensor(b!) x, str kind) -> ()", fake=lambda dy, x, kind: None
)
_packed_backward_again_ = define(
    "glu_bwd_again_(Tensor(a!) dy, Tensor(b!) packed, str kind) -> ()", fake=lambda dy, packed, kind: None
)
_pair_forward = define(
    "glu_pair_fwd(Tensor gate, Tensor up, str kind) -> Tensor", fake=lambda gate, up, kind: _like(gate)
)
_pair_backward = define(
    "glu_pair_bwd(Tensor dy, Tensor gate, Tensor up, str kind) -> (Tensor, Tensor)",
    fake=lambda dy, gate, up, kind: (_like(gate), _like(up)),
)
for _op, _function, _name in (
    ("activation_fwd", reference.forward, "forward"),
    ("activation_bwd", reference.backward, "backward"),
    ("glu_fwd", packed_forward, "packed_forward"),
    ("glu_bwd", packed_backward, "packed_backward"),
    ("glu_pair_fwd", reference.gated_forward, "gated_forward"),
    ("glu_pair_bwd", reference.gated_backward, "gated_backward"),
):
    register(_op, "reference", _function)
    _target = f"megalite_kernels.native.activation:{_name}"
    register_lazy(_op, "cpu", _target, requires=NATIVE, supports=native_supports)
    _target = f"megalite_kernels.triton.activation:{_name}"
    register_lazy(_op, "triton", _target, requires=TRITON, supports=triton_supports)
# On GPUs the forward's kernel makes the output again.
for _op, _again in (
    ("activation_bwd_again_", backward_again_),
    ("glu_bwd_again_", packed_backward_again_),
):
    register(_op, "reference", _again)
    _target = f"megalite_kernels.native.activation:{_again.__name__}"
    register_lazy(_op, "cpu", _target, requires=NATIVE, supports=native_supports)


def _save(ctx: Any, x: Tensor, kind: str, again: Again | None, in_place: bool) -> Tensor:
    x = x.contiguous()
    ctx.save_for_backward(x)
    ctx.kind, ctx.again, ctx.in_place, ctx.spent = kind, again, in_place, False
    return x


def _gradient(
    ctx: Any,
    dy: Tensor,
    forward: Callable[..., Tensor],
    backward: Callable[..., Tensor],
    backward_again_: Callable[..., None],
) -> tuple[Tensor, None, None, None]:
    # Autograd's own check of versions does not see tensors that a hook on saved tensors keeps.
    if ctx.spent:
        raise RuntimeError(
            "a second backward pass through an activation with in_place=True, whose input the first has overwritten: "
            "run the forward pass again, or leave in_place out"
        )
    (x,) = ctx.saved_tensors
    dy = dy.contiguous()
    if ctx.again is None:
        return backward(dy, x, ctx.kind), None, None, None
    if ctx.in_place and x.device.type == "cpu":
        y, dx = dy, x.detach()
        backward_again_(y, dx, ctx.kind)
        ctx.spent = True
        increment_version((y, dx))  # autograd refuses them to whoever else saved them
    else:
        dx, y = backward(dy, x, ctx.kind), forward(x, ctx.kind)
    ctx.again(y)
    return dx, None, None, None


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, again: Again | None, in_place: bool) -> Tensor:
        return _activation_forward(_save(ctx, x, kind, again, in_place), kind)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _gradient(ctx, dy, _activation_forward, _activation_backward, _backward_again_)


class _GatedPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, kind: str, again: Again | None, in_place: bool) -> Tensor:
        return _packed_forward(_save(ctx, packed, kind, again, in_place), kind)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _gradient(ctx, dy, _packed_forward, _packed_backward, _packed_backward_again_)


class _GatedPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _pair_forward(gate, up, kind)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *_pair_backward(dy.contiguous(), gate, up, ctx.kind), None
