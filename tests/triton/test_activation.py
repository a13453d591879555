"""swiglu, geglu, gelu and relu² on Triton, in small blocks, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.triton.activation import GATED, gated_sizes
from megalite_kernels.triton.launch import Launch, override
from tests.helpers.margins import surrounded, surrounded_outputs
from tests.ops.catalogue import check, random
from tests.ops.test_activation import plain_gelu, plain_swiglu

SIZES = [
    (1, torch.float32),
    (13, torch.float16),
    (64, torch.bfloat16),
    (77, torch.bfloat16),
    (77, torch.float32),
]


@pytest.fixture(autouse=True)
def _small_blocks() -> Iterator[None]:
    """32 elements a program: several programs a row, or several rows a program, with a ragged end."""
    with override("activation", Launch({"BLOCK": 32})), override("glu", Launch({"BLOCK": 32})):
        yield


GATED_OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "swiglu": (mk.swiglu, F.silu),
    "geglu": (mk.geglu, plain_gelu),
    "exact geglu": (lambda g, u=None: mk.geglu(g, u, approximate="none"), F.gelu),
}
PLAIN_OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "gelu": (mk.gelu, plain_gelu),
    "exact gelu": (lambda x: mk.gelu(x, approximate="none"), F.gelu),
    "relu_squared": (mk.relu_squared, lambda x: torch.relu(x).square()),
}


@pytest.mark.parametrize(("size", "dtype"), SIZES)
class TestAccuracy:
    @pytest.mark.parametrize("name", GATED_OPS)
    def test_packed(self, name: str, size: int, dtype: torch.dtype) -> None:
        ours, plain = GATED_OPS[name]
        inputs = [random(5, 2 * size, scale=3)]
        check(
            ours,
            lambda x: plain(x[:, : x.shape[1] // 2]) * x[:, x.shape[1] // 2 :],
            inputs,
            dtype=dtype,
            backend="triton",
        )

    @pytest.mark.parametrize("name", GATED_OPS)
    def test_pair(self, name: str, size: int, dtype: torch.dtype) -> None:
        ours, plain = GATED_OPS[name]
        inputs = [random(5, size, scale=3), random(5, size, seed=1)]
        check(ours, lambda g, u: plain(g) * u, inputs, dtype=dtype, backend="triton")

    @pytest.mark.parametrize("name", PLAIN_OPS)
    def test_plain(self, name: str, size: int, dtype: torch.dtype) -> None:
        ours, plain = PLAIN_OPS[name]
        check(ours, plain, [random(5, size, scale=3)], dtype=dtype, backend="triton")


@pytest.mark.parametrize("name", GATED_OPS)
def test_extremes_saturate(name: str) -> None:
    gate = torch.tensor([-1e30, -1e4, -100.0, -0.0, 0.0, 100.0, 1e4, 1e18, 1e30], requires_grad=True)
    with mk.use_backend("triton"):
        y = GATED_OPS[name][0](gate, torch.ones(9))
        (dgate,) = torch.autograd.grad(y.sum(), gate)
    expected = torch.tensor([0, 0, 0, 0, 0, 100.0, 1e4, 1e18, 1e30])
    torch.testing.assert_close(y.detach(), expected, atol=1e-30, rtol=1e-6)
    torch.testing.assert_close(dgate, torch.tensor([0, 0, 0, 0.5, 0.5, 1, 1, 1, 1]), atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("name", ["gelu_tanh", "silu"])
def test_slopes_keep_their_digits_in_the_tail(name: str) -> None:
    """Where the value is near zero, 1 + tanh(u) would have cancelled; the sigmoid of exp(-|2u|) does not."""
    x = torch.linspace(-6, -2, 50)
    with mk.use_backend("triton"):
        y = torch.ops.megalite.activation_fwd(x, name)
    exact = plain_gelu(x.double()) if name == "gelu_tanh" else F.silu(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=0)


def test_nan_passes_through_and_stays() -> None:
    x = random(70)
    x[3] = torch.nan
    with mk.use_backend("triton"):
        for op, _ in PLAIN_OPS.values():
            assert torch.equal(torch.isnan(op(x)), torch.isnan(x))
        for op, _ in GATED_OPS.values():
            gate = x.clone().requires_grad_()
            y = op(gate, torch.ones(70))
            assert torch.equal(torch.isnan(y), torch.isnan(x))
            assert torch.equal(torch.isnan(torch.autograd.grad(y.sum(), gate)[0]), torch.isnan(x))


@pytest.mark.parametrize("features", [5, 37])
def test_nothing_outside_of_the_tensors_is_read_or_written(features: int) -> None:
    x, packed = surrounded(random(3, features)), surrounded(random(3, 2 * features))
    ops = torch.ops.megalite
    with mk.use_backend("triton"), surrounded_outputs():
        results = [
            ops.activation_fwd(x, "gelu_tanh"),
            ops.activation_bwd(x, x, "relu2"),
            ops.glu_fwd(packed, "silu"),
            ops.glu_bwd(x, packed, "silu"),
            ops.glu_pair_fwd(x, x, "gelu"),
            *ops.glu_pair_bwd(x, x, x, "gelu"),
        ]
    assert all(bool(torch.isfinite(result).all()) for result in results)


def test_biases_non_contiguous_and_empty() -> None:
    check(
        lambda x, b: mk.swiglu(x.t(), bias=b),
        lambda x, b: plain_swiglu(x.t() + b),
        [random(24, 10), random(24, seed=1)],
        dtype=torch.float32,
        backend="triton",
    )
    with mk.use_backend("triton"):
        assert mk.swiglu(torch.empty(0, 8)).shape == (0, 4)
        assert mk.swiglu(torch.empty(3, 0), torch.empty(3, 0)).shape == (3, 0)
        assert mk.gelu(torch.empty(3, 0)).shape == (3, 0)


def test_inputs_are_not_written_and_bits_repeat() -> None:
    x = random(5, 26).bfloat16().requires_grad_()
    before = x.detach().clone()
    with mk.use_backend("triton"):
        first, second = (torch.autograd.grad(mk.swiglu(x).float().sum(), x)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(x, before)
    assert x._version == 0


@pytest.mark.parametrize("features", [1, 13, 704, 11008, 14336, 65536])
def test_tiles_fill_a_program(features: int) -> None:
    for table in GATED.entries.values():
        blocks = gated_sizes(features, table).blocks
        assert blocks["BLOCK_T"] * blocks["BLOCK_F"] == table.blocks["BLOCK"]
        assert blocks["BLOCK_T"] == 1 or blocks["BLOCK_F"] >= features
