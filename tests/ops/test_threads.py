"""The native library on two threads: the same bits on every run, and per row those of one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from tests.ops.catalogue import needs_native, random

pytestmark = needs_native

TARGET = torch.arange(600) % 400
BOUNDS = torch.tensor([0, 100, 101, 350, 600], dtype=torch.int32)
X, ANGLES = random(600, 256), random(600, 32, seed=3)

CALLS: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "rms_norm": (mk.rms_norm, [X, random(256, seed=1)]),
    "layer_norm": (mk.layer_norm, [X, random(256, seed=1), random(256, seed=2)]),
    "swiglu": (mk.swiglu, [X]),
    "gelu": (mk.gelu, [X]),
    "rope": (lambda q: mk.rope(q, q * 2, ANGLES.cos(), ANGLES.sin()), [X.view(600, 4, 64)]),
    "rope_norm": (
        lambda q, w, v: mk.rope(q, q * 2, ANGLES.cos(), ANGLES.sin(), q_norm=w, k_norm=v),
        [X.view(600, 4, 64), random(64, seed=1), random(64, seed=2)],
    ),
    "embedding": (lambda w: mk.embedding(TARGET, w), [random(450, 256)]),
    "cross_entropy": (lambda x: mk.cross_entropy(x, TARGET % 256, reduction="none"), [X]),
    "linear_cross_entropy": (
        lambda x, w: mk.linear_cross_entropy(x, w, TARGET, reduction="none"),
        [X, random(400, 256, seed=1)],
    ),
    "attention": (
        lambda q, k: mk.attention(q, k, k * 0.5, cu_seqlens=BOUNDS, max_seqlen=250),
        [X.view(600, 4, 64), random(600, 2, 64, seed=1)],
    ),
    "packed_attention": (
        lambda qkv: mk.packed_attention(
            qkv, 4, 2, rotary=(ANGLES.cos(), ANGLES.sin()), cu_seqlens=BOUNDS, max_seqlen=250
        ),
        [random(600, 512)],
    ),
}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def results(name: str) -> list[Tensor]:
    function, inputs = CALLS[name]
    leaves = [x.detach().bfloat16().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
    return [o.detach() for o in outputs] + list(grads)


@pytest.mark.parametrize("name", CALLS)
def test_two_threads_repeat_bits(name: str, two_threads: None) -> None:
    first = results(name)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, results(name), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_outputs_have_the_bits_of_one_thread(name: str, two_threads: None) -> None:
    two = results(name)[0]
    torch.set_num_threads(1)
    one = results(name)[0]
    if name == "linear_cross_entropy":  # torch's product may cut its sums differently
        torch.testing.assert_close(two, one)
    else:
        assert torch.equal(two, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_has_the_bits_of_one_thread(dtype: torch.dtype) -> None:
    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        buffers = [random(100_001, seed=i).abs() for i in range(4)]
        params = buffers[0].to(dtype)
        scalars = {"lr": torch.tensor(1e-2), "step": torch.tensor(3), "clip_coefficient": torch.tensor(0.5)}
        mk.adamw_(
            params, *buffers[:3], buffers[3], beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
            skip=torch.tensor(False), **scalars,
        )  # fmt: skip
        torch.set_num_threads(1)
        return [params, *buffers]

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(2), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_gradient_has_the_bits_of_one_thread(dtype: torch.dtype, two_threads: None) -> None:
    dy, x = random(600, 200).to(dtype), random(600, 130, seed=1).to(dtype)
    found = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        found.append(torch.zeros(200, 130))
        with mk.use_backend("cpu"):
            torch.ops.megalite.linear_weight_grad_(dy, x, found[-1])
    assert torch.equal(*found)
