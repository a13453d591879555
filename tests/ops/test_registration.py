"""Every op as torch sees it: schema, fake tensors, functionalization, full-graph compilation, recomputation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import megalite_kernels as mk
from megalite_kernels import backend
from megalite_kernels.ops.fp8_linear import quantize_weight
from tests.ops.catalogue import RAW_BACKENDS, random

X, WEIGHT, TABLE = random(6, 16), random(16, seed=1), random(6, 4, seed=2)
Q, KV = random(6, 4, 8), random(6, 2, 8, seed=1)
TARGET = torch.tensor([0, 3, -100, 15, 2, 1])
IDS = torch.tensor([0, 3, 8, 3, 2, 0])
LOSS = (-100, 0.1, 0.01, 3.0)
SHARD = (8, 13, 50)
HEAD = (X, random(16, 16, seed=3), WEIGHT.clone(), TARGET % 6)
BOUNDS = torch.tensor([0, 2, 6], dtype=torch.int32)
E4M3 = torch.float8_e4m3fn
PACKED = (TABLE, TABLE, BOUNDS, None, 4, 2, True, 3, 0, 4, 0.0, 0.35)
ATTENTION = (BOUNDS, None, None, True, 3, 0, 4, 0.0, 0.35)

CALLS: dict[str, tuple[Any, ...]] = {
    "rms_norm_fwd": (X, WEIGHT, 1e-6, True),
    "rms_norm_residual_fwd": (X, X, WEIGHT, 1e-6, False),
    "rms_norm_bwd": (X, X, X, WEIGHT, torch.ones(6), False),
    "rms_norm_bwd_again": (X, X, X, WEIGHT, torch.ones(6), True),
    "layer_norm_fwd": (X, WEIGHT, WEIGHT, 1e-5),
    "layer_norm_residual_fwd": (X, X, WEIGHT, None, 1e-5),
    "layer_norm_bwd": (X, None, X, WEIGHT, torch.zeros(6), torch.ones(6)),
    "layer_norm_bwd_again": (X, None, X, WEIGHT, WEIGHT, torch.zeros(6), torch.ones(6)),
    "activation_fwd": (X, "gelu_tanh"),
    "activation_bwd": (X, X, "relu2"),
    "activation_bwd_again_": (X.clone(), X.clone(), "gelu"),
    "glu_fwd": (X, "silu"),
    "glu_bwd": (X[:, :8].contiguous(), X, "silu"),
    "glu_bwd_again_": (X[:, :8].clone(), X.clone(), "gelu_tanh"),
    "glu_pair_fwd": (X, X, "gelu_tanh"),
    "glu_pair_bwd": (X, X, X, "silu"),
    "rope_fwd": (Q, KV, TABLE, TABLE, True, False),
    "rope_": (Q.clone(), KV.clone(), TABLE, TABLE, False, False),
    "rope_norm_fwd": (Q, KV, WEIGHT[:8].clone(), WEIGHT[8:].clone(), TABLE, TABLE, 1e-6, True),
    "rope_norm_bwd": (
        Q, KV, Q, KV, WEIGHT[:8].clone(), WEIGHT[8:].clone(), torch.ones(24), torch.ones(12), TABLE, TABLE, False
    ),
    "embedding_bwd": (X, IDS, 9),
    "embedding_bwd_": (X, IDS, torch.zeros(9, 16)),
    "cross_entropy_fwd": (X, TARGET, *LOSS),
    "cross_entropy_bwd": (torch.ones(6), X, TARGET, torch.ones(6), *LOSS),
    "cross_entropy_grad_": (X.clone(), TARGET, torch.ones(()), *LOSS),
    "cross_entropy_local_fwd": (X, TARGET, 8, 13, *LOSS),
    "cross_entropy_local_bwd": (X, TARGET, torch.ones(6), torch.ones(()), *SHARD, *LOSS),
    "cross_entropy_local_bwd_": (X.clone(), TARGET, torch.ones(6), torch.ones(6), *SHARD, *LOSS),
    "linear_cross_entropy_fwd": (*HEAD, 14, *LOSS),
    "linear_cross_entropy_grad": (*HEAD[:2], None, TARGET % 6, torch.ones(6), 16, *LOSS),
    "linear_cross_entropy_grad_": (*HEAD[:2], None, TARGET % 6, torch.ones(6), torch.zeros(16, 16), False, 16, *LOSS),
    "linear_cross_entropy_local_fwd": (*HEAD, 8, 13, *LOSS),
    "linear_cross_entropy_bwd": (*HEAD, torch.ones(6), torch.ones(()), *SHARD, *LOSS),
    "linear_cross_entropy_bwd_": (
        *HEAD[:2], None, TARGET, torch.ones(6), torch.ones(()), torch.zeros(16, 16), *SHARD, *LOSS,
    ),
    "scaled_copy": (X, torch.tensor(0.3), torch.bfloat16),
    "linear_fwd": (X, random(4, 16), random(4)),
    "linear_dgrad": (X, random(16, 5)),
    "linear_weight_grad": (X, random(6, 5)),
    "linear_weight_grad_": (X, X, torch.zeros(16, 16)),
    "fp8_quantize_rows": (X, E4M3),
    "fp8_quantize_columns": (X, E4M3),
    "fp8_tensor_scale": (X, torch.float8_e5m2),
    "fp8_cast": (X, torch.tensor(0.5), E4M3),
    "fp8_cast_transposed": (X, torch.tensor(0.5), E4M3),
    "fp8_rms_norm_fwd": (X, WEIGHT, 1e-6, True),
    "fp8_rms_norm_residual_fwd": (X, X + 1, WEIGHT, 1e-6, False),
    "fp8_layer_norm_fwd": (X, WEIGHT, WEIGHT.clone(), 1e-5),
    "fp8_layer_norm_residual_fwd": (X, X + 1, WEIGHT, None, 1e-5),
    "fp8_activation_fwd": (X, "gelu_tanh"),
    "fp8_glu_fwd": (X, "silu"),
    "fp8_product": (X.to(E4M3), torch.ones(6), X.to(E4M3), torch.ones(6), None, torch.bfloat16),
    "attention_fwd": (Q, KV, KV, *ATTENTION),
    "attention_bwd": (Q, None, Q, KV, KV, Q, torch.ones(4, 6), *ATTENTION),
    "packed_attention_fwd": (random(6, 64), *PACKED),
    "packed_attention_bwd": (Q, random(6, 64), Q, torch.ones(4, 6), *PACKED),
    "adamw_": (
        *(random(8, seed=i).abs() for i in range(5)), torch.tensor(1e-3), 0.9, 0.95, 1e-8, 0.1, torch.tensor(1),
        torch.tensor(1.0), torch.tensor(False),
    ),
    "adamw_remainder_": (
        random(8).bfloat16(), random(8, seed=5, scale=1e4).short(), *(random(8, seed=i).abs() for i in range(1, 4)),
        torch.tensor(1e-3), 0.9, 0.95, 1e-8, 0.1, torch.tensor(1), torch.tensor(1.0), torch.tensor(False),
    ),
    "adamw_stochastic_": (
        random(8).bfloat16(), *(random(8, seed=i).abs() for i in range(1, 4)), torch.tensor(1e-3), 0.9, 0.95, 1e-8,
        0.1, torch.tensor(1), torch.tensor(1.0), torch.tensor(False), torch.tensor(5),
    ),
    "grad_norm": ([X.flatten(), WEIGHT],),
    "grad_norms": ([X, WEIGHT],),
}  # fmt: skip


def test_no_op_is_forgotten() -> None:
    assert set(CALLS) == set(backend._implementations)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "fp8_product":
        tests.remove(
            "test_schema"
        )  # it compares arguments before and after by `allclose`, which takes no FP8
    torch.library.opcheck(getattr(torch.ops.megalite, name).default, CALLS[name], test_utils=tests)


@pytest.mark.parametrize("name", CALLS)
def test_fake_and_every_backend_agree_on_shapes_dtypes_and_strides(name: str) -> None:
    """The fake is opcheck's business; here every backend against the reference."""

    def described(result: Any) -> list[tuple[Any, ...]]:
        tensors = result if isinstance(result, tuple) else (result,)
        return [(t.shape, t.dtype, t.stride()) for t in tensors if isinstance(t, Tensor)]

    found = []
    for chosen in RAW_BACKENDS:
        implementation = backend._implementations[name].get(chosen)
        if implementation is not None and (function := implementation.load()) is not None:
            arguments = [a.clone() if isinstance(a, Tensor) else a for a in CALLS[name]]
            found.append(described(function(*arguments)))
    assert all(one == found[0] for one in found)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return mk.attention(q, k, v, cu_seqlens=BOUNDS, max_seqlen=4)


def _packed_attention(qkv: Tensor) -> Any:
    return mk.packed_attention(qkv, 4, 2, rotary=(TABLE.cos(), TABLE.sin()), cu_seqlens=BOUNDS, max_seqlen=4)


def _rope(q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor) -> Any:
    return mk.rope(q, k, TABLE.cos(), TABLE.sin(), q_norm=q_norm, k_norm=k_norm)


def _rope_(q: Tensor, k: Tensor) -> Any:
    return mk.rope_(q * 2, k * 2, TABLE.cos(), TABLE.sin())


def _fp8_tensorwise(x: Tensor, weight: Tensor) -> Tensor:
    return mk.fp8_linear(x, weight, scaling="tensorwise")


def _fp8_norms(x: Tensor, residual: Tensor, weight: Tensor, layer: Tensor, bias: Tensor, up: Tensor) -> Any:
    """A block's chain, in which every quantised tensor comes out of a fused kernel."""
    first, total = mk.fp8_rms_norm(x, weight, residual=residual)
    second = mk.fp8_layer_norm(mk.fp8_linear(first, up), layer, bias)
    third, total = mk.fp8_layer_norm(mk.fp8_linear(second, up), layer, bias, residual=total)
    out = mk.fp8_linear(mk.fp8_rms_norm(third.value, weight), up)
    return out, mk.fp8_linear(mk.fp8_activation(third.value, "gelu"), up), total


def _fp8_gated(x: Tensor, down: Tensor) -> Tensor:
    """With a weight that is quantised once for two products."""
    copies = quantize_weight(down.detach())
    once = mk.fp8_linear(mk.fp8_activation(x, "swiglu"), down, quantized_weight=copies)
    return once + mk.fp8_linear(mk.fp8_activation(x * 2, "geglu"), down, quantized_weight=copies)


# torch 2.13 cannot trace an autograd.Function that gets one tensor twice, so all inputs are different ones.
COMPILED: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "rms_norm": (mk.rms_norm, [X, WEIGHT]),
    "rms_norm_residual": (lambda x, r, w: mk.rms_norm(x, w, residual=r), [X, X + 1, WEIGHT]),
    "layer_norm": (mk.layer_norm, [X, WEIGHT, WEIGHT]),
    "swiglu": (mk.swiglu, [X]),
    "geglu": (mk.geglu, [X, X]),
    "gelu": (mk.gelu, [X]),
    "relu_squared": (mk.relu_squared, [X]),
    "rope_": (_rope_, [Q, KV]),
    "embedding": (lambda w: mk.embedding(IDS, w), [random(9, 16)]),
    "rope": (_rope, [Q, KV, WEIGHT[:8], WEIGHT[8:]]),
    "attention": (_attention, [Q, KV, KV + 1]),
    "packed_attention": (_packed_attention, [random(6, 64)]),
    "cross_entropy": (lambda x: mk.cross_entropy(x, TARGET), [X]),
    "linear_cross_entropy": (lambda x, w: mk.linear_cross_entropy(x, w, TARGET), [X, random(16, 16)]),
    "linear_cross_entropy_none": (
        lambda x, w: mk.linear_cross_entropy(x, w, TARGET, reduction="none"),
        [X, random(16, 16)],
    ),
    "linear": (mk.linear, [X, random(4, 16)]),
    "fp8_linear": (mk.fp8_linear, [X, random(4, 16)]),
    "fp8_linear_tensorwise": (_fp8_tensorwise, [X, random(4, 16)]),
    "fp8_norms": (_fp8_norms, [X, X + 1, WEIGHT, WEIGHT + 1, WEIGHT + 2, random(16, 16)]),
    "fp8_gated": (_fp8_gated, [X, random(4, 8)]),
}


def _grads(function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((o * o).sum() for o in outputs)
    return [o.detach() for o in outputs] + list(torch.autograd.grad(total, leaves))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", COMPILED)
def test_fullgraph_compile_gives_the_same_bits(name: str) -> None:
    function, inputs = COMPILED[name]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in inputs]
    for ours, eager in zip(_grads(compiled, leaves), _grads(function, leaves), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("name", COMPILED)
def test_recomputation_gives_the_same_bits(name: str) -> None:
    function, inputs = COMPILED[name]
    leaves = [x.clone().requires_grad_() for x in inputs]

    def recomputed(*args: Tensor) -> Any:
        return checkpoint(function, *args, use_reentrant=False)

    for ours, stored in zip(_grads(recomputed, leaves), _grads(function, leaves), strict=True):
        assert torch.equal(ours, stored)


def test_ops_that_write_compile() -> None:
    """adamw_ and the accumulating linear mutate their buffers inside a compiled graph."""

    def step(params: Tensor, master: Tensor, m: Tensor, v: Tensor, grads: Tensor) -> Tensor:
        norm = mk.grad_norm(grads)
        clip = torch.clamp(1.0 / norm, max=1.0)
        mk.adamw_(
            params, master, m, v, grads, lr=torch.tensor(1e-2), beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
            step=torch.tensor(1), clip_coefficient=clip, skip=~torch.isfinite(norm),
        )  # fmt: skip
        return norm

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, theirs = ([random(40, seed=i).abs() for i in range(5)] for _ in range(2))
    assert torch.equal(compiled(*ours), step(*theirs))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_backend_switches_without_recompiling() -> None:
    compiled = torch.compile(mk.gelu, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()
    before = compiled(X)
    with mk.use_backend("reference"):
        switched = compiled(X)
        assert torch.equal(switched, mk.gelu(X))
    torch.testing.assert_close(before, switched)


ACCUMULATING: dict[str, Callable[..., Any]] = {
    "embedding": lambda x, w, main_grad: mk.embedding(IDS, w, main_grad=main_grad) * x,
    "linear": lambda x, w, main_grad: mk.linear(x, w, main_grad=main_grad),
    "fp8_linear": lambda x, w, main_grad: mk.fp8_linear(x, w, main_grad=main_grad),
    "fp8_linear_tensorwise": lambda x, w, main_grad: mk.fp8_linear(
        x, w, main_grad=main_grad, scaling="tensorwise"
    ),
    "linear_cross_entropy": lambda x, w, main_grad: mk.linear_cross_entropy(
        x, w, TARGET, main_grad=main_grad
    ),
    "linear_cross_entropy_none": lambda x, w, main_grad: mk.linear_cross_entropy(
        x, w, TARGET, reduction="none", main_grad=main_grad
    ),
}


@pytest.mark.parametrize("name", ACCUMULATING)
def test_main_gradients_compile_and_recompute(name: str) -> None:
    """Adding into main_grad happens once, and to the same bits, eager, compiled and recomputed."""
    function = ACCUMULATING[name]
    torch.compiler.reset()

    def run(call: Callable[..., Any]) -> tuple[Tensor | None, Tensor | None, Tensor]:
        x, weight = X.clone().requires_grad_(), random(16, 16).requires_grad_()
        main_grad = torch.ones(16, 16)
        call(x, weight, main_grad).square().sum().backward()
        return x.grad, weight.grad, main_grad

    def recomputed(*args: Tensor) -> Any:
        return checkpoint(function, *args, use_reentrant=False)

    dx, dweight, main_grad = run(function)
    assert dweight is None
    assert dx is not None
    assert not torch.equal(main_grad, torch.ones(16, 16))
    for call in (torch.compile(function, fullgraph=True, backend="aot_eager"), recomputed):
        other_dx, other_dweight, other_main_grad = run(call)
        assert other_dweight is None
        assert other_dx is not None
        assert torch.equal(dx, other_dx)
        assert torch.equal(main_grad, other_main_grad)


def test_a_gradient_known_beforehand_compiles() -> None:
    """The weight's gradient goes into main_grad in the forward, once, and to the same bits as eager."""

    def step(x: Tensor, weight: Tensor, main_grad: Tensor, scale: Tensor) -> Tensor:
        loss = mk.linear_cross_entropy(
            x, weight, TARGET, reduction="sum", main_grad=main_grad, grad_scale=scale
        )
        return loss * scale

    torch.compiler.reset()
    found = []
    for call in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        x, main_grad = X.clone().requires_grad_(), torch.ones(16, 16)
        call(x, random(16, 16), main_grad, torch.tensor(0.3)).backward()
        found.append((x.grad, main_grad))
    for ours, eager in zip(*found, strict=True):
        assert torch.equal(ours, eager)
    assert not torch.equal(found[0][1], torch.ones(16, 16))
