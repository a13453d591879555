"""Back-ends of other packages, with stand-ins for their modules: what they are given, and what they refuse."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels import backend
from megalite_kernels.ops.attention import reference_backward, reference_forward
from megalite_kernels.peers import apex, flash_attn
from megalite_kernels.reference import layer_norm as layer_reference
from megalite_kernels.reference import rms_norm as rms_reference
from tests.ops.catalogue import DEVICE, random

FLASH = ("flash_attn", "flash_attn_3", "flash_attn_4")
Z, SCALE = torch.empty(0), 0.3


def dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, cap: float
) -> tuple[Tensor, Tensor]:
    """One sequence [S, N, D] with windows as flash-attention defines them; differentiable."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qnd,knd->nqk", q, k) * scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    place = torch.arange(q.shape[0]).unsqueeze(1) + k.shape[0] - q.shape[0]
    key = torch.arange(k.shape[0])
    seen = ((key >= place - left) | (left < 0)) & ((key <= place + right) | (right < 0))
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("nqk,knd->qnd", scores.softmax(-1), v), scores.logsumexp(-1)


def run_all(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, scale: float, left: int, right: int, cap: float
) -> tuple[Tensor, Tensor]:
    """Every batch entry, or every packed document."""
    if bounds is None:
        parts = [dense(*one, scale, left, right, cap) for one in zip(q, k, v, strict=True)]
        return torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])
    ends = bounds.tolist()
    parts = [dense(q[a:b], k[a:b], v[a:b], scale, left, right, cap) for a, b in itertools.pairwise(ends)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], 1)


def gradients(dout: Tensor, tensors: tuple[Tensor, ...], *rest: Any) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    with torch.enable_grad():
        return torch.autograd.grad(run_all(*leaves, *rest)[0], leaves, dout)


class Flash2(ModuleType):
    """The four functions of flash-attn 2 that are called, with its own parameter names."""

    def _flash_attn_forward(self, q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
                            softcap, alibi_slopes, return_softmax):  # type: ignore[no-untyped-def]  # fmt: skip
        assert (dropout_p, alibi_slopes, return_softmax) == (0.0, None, False)
        right = 0 if causal else window_size_right
        return *run_all(q, k, v, None, softmax_scale, window_size_left, right, softcap), Z, Z

    def _flash_attn_varlen_forward(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                                   softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
                                   return_softmax):  # type: ignore[no-untyped-def]  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k >= cu_seqlens_q.diff().max()
        right = 0 if causal else window_size_right
        return *run_all(q, k, v, cu_seqlens_q, softmax_scale, window_size_left, right, softcap), Z, Z

    def _flash_attn_backward(
        self,
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        bounds=None,
    ):
        assert deterministic
        right = 0 if causal else window_size_right
        found = gradients(dout, (q, k, v), bounds, softmax_scale, window_size_left, right, softcap)
        for target, grad in zip((dq, dk, dv), found, strict=True):
            target.copy_(grad)
        return Z

    def _flash_attn_varlen_backward(self, dout, q, k, v, out, lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
                                    max_seqlen_q, max_seqlen_k, **options):  # type: ignore[no-untyped-def]  # fmt: skip
        return self._flash_attn_backward(dout, q, k, v, out, lse, dq, dk, dv, **options, bounds=cu_seqlens_q)


class Flash3(ModuleType):
    """As above, for flash-attn 3."""

    def _flash_attn_forward(self, q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
                            max_seqlen_k=None, softmax_scale=None, causal=False, window_size_left=-1,
                            window_size_right=-1, softcap=0.0):  # type: ignore[no-untyped-def]  # fmt: skip
        right = 0 if causal else window_size_right
        return *run_all(q, k, v, cu_seqlens_q, softmax_scale, window_size_left, right, softcap), Z, Z

    def _flash_attn_backward(self, dout, q, k, v, out, softmax_lse, *, cu_seqlens_q=None, cu_seqlens_k=None,
                             max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None,
                             is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
                             deterministic=False):  # type: ignore[no-untyped-def]  # fmt: skip
        assert deterministic
        right = 0 if is_causal else window_size_right
        found = gradients(dout, (q, k, v), cu_seqlens_q, softmax_scale, window_size_left, right, softcap)
        for target, grad in zip((dq, dk, dv), found, strict=True):
            target.copy_(grad)
        return Z


class Flash4(ModuleType):
    """As above, for flash-attn 4."""

    def _flash_attn_fwd(
        self,
        q,
        k,
        v,
        *,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        softmax_scale=None,
        causal=False,
        return_lse=False,
    ):
        assert return_lse
        return run_all(q, k, v, cu_seqlens_q, softmax_scale, -1, 0 if causal else -1, 0.0)

    def _flash_attn_bwd(self, q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, *,
                        cu_seqlens_q=None, cu_seqlens_k=None):  # type: ignore[no-untyped-def]  # fmt: skip
        return gradients(dout, (q, k, v), cu_seqlens_q, softmax_scale, -1, 0 if causal else -1, 0.0)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in zip(FLASH, (Flash2, Flash3, Flash4), strict=True):
        monkeypatch.setitem(sys.modules, flash_attn.MODULES[name], kind(name))


PLAIN = {"causal": True, "window": 0, "offset": 0, "max_seqlen": 0, "softcap": 0.0, "scale": SCALE}


@pytest.mark.skipif(DEVICE != "cpu", reason="the stand-ins compute on the CPU")
@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "changed", [{}, {"causal": False}, {"window": 5}, {"causal": False, "window": 4}, {"softcap": 2.0}]
)
def test_flash_attention_is_given_what_it_means(name: str, packed: bool, changed: dict[str, Any]) -> None:
    if name == "flash_attn_4" and (changed.get("window") or changed.get("softcap")):
        pytest.skip("refused, as tested below")
    options = tuple({**PLAIN, **changed}.values())
    shape = (20,) if packed else (2, 20)
    q, dout = random(*shape, 4, 8), random(*shape, 4, 8, seed=3)
    k, v = random(*shape, 2, 8, seed=1), random(*shape, 2, 8, seed=2)
    bounds = (torch.tensor([0, 7, 20], dtype=torch.int32) if packed else None, None, None)
    suffix = name.removeprefix("flash_attn")
    out, lse = getattr(flash_attn, f"forward{suffix}")(q, k, v, *bounds, *options)
    right = reference_forward(q, k, v, *bounds, *options)
    torch.testing.assert_close((out, lse), right)
    ours = getattr(flash_attn, f"backward{suffix}")(dout, None, q, k, v, out, lse, *bounds, *options)
    torch.testing.assert_close(ours, reference_backward(dout, None, q, k, v, *right, *bounds, *options))


def test_reasons_of_flash_attention() -> None:
    q, k = random(1, 6, 4, 8).bfloat16(), random(1, 6, 2, 8).bfloat16()
    none = (None, None, None)

    def reason(*arguments: Any, **changed: Any) -> str:
        found = flash_attn.supports_forward(*arguments, *{**PLAIN, **changed}.values())
        assert found is not None
        return found

    assert reason(q.float(), k, k, *none) == "takes bfloat16 and float16, not torch.float32"
    assert "multiples of 8 up to 256, not 7" in reason(q[..., :7], k[..., :7], k[..., :7], *none)
    assert reason(q, k, k, None, None, torch.ones(4)) == "has no sinks"
    assert "for the keys" in reason(q, k, k, None, torch.ones(2), None)
    assert reason(q, k[:, :0], k[:, :0], *none) == "takes no empty tensors"
    assert reason(q, k, k, *none, offset=2) == "takes no offset of the queries (2)"
    assert reason(q, k[:, :3], k[:, :3], *none) == "takes no queries that see no key"
    if DEVICE == "cpu":
        assert reason(q, k, k, *none) == "runs on GPUs, q is on cpu"
    rest = (q, k, k, q, q, *none, *PLAIN.values())
    assert flash_attn.supports_backward(q, q, *rest) == "has no gradient through the log-sum-exp"
    windowed = tuple({**PLAIN, "window": 3}.values())
    assert "has no window" in (flash_attn.supports_forward_4(q, k, k, *none, *windowed) or "")
    assert "has no window" in (flash_attn.supports_backward_4(q, None, q, k, k, q, q, *none, *windowed) or "")
    assert "log-sum-exp" in (flash_attn.supports_backward_4(q, q, q, k, k, q, q, *none, *windowed) or "")


class Apex(ModuleType):
    """The four functions of NVIDIA apex's extension."""

    def rms_forward_affine(self, x: Tensor, shape: tuple[int], weight: Tensor, eps: float) -> Any:
        assert shape == tuple(weight.shape)
        return rms_reference.forward(x, weight, eps, False)

    def rms_backward_affine(self, dy, rstd, x, shape, weight, eps, memory_efficient):  # type: ignore[no-untyped-def]
        assert memory_efficient is False
        return rms_reference.backward(dy, None, x, weight, rstd, False)

    def forward_affine(self, x: Tensor, shape: tuple[int], weight: Tensor, bias: Tensor, eps: float) -> Any:
        return layer_reference.forward(x, weight, bias, eps)

    def backward_affine(self, dy, mean, rstd, x, shape, weight, bias, eps, memory_efficient):  # type: ignore[no-untyped-def]
        assert memory_efficient is False
        return layer_reference.backward(dy, None, x, weight, mean, rstd)


def test_apex_is_given_what_it_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, apex.MODULE, Apex(apex.MODULE))
    x, dy, weight, bias = random(5, 16), random(5, 16, seed=1), random(16, seed=2), random(16, seed=3)
    y, rstd = apex.rms_forward(x, weight, 1e-6, False)
    torch.testing.assert_close((y, rstd), rms_reference.forward(x, weight, 1e-6, False))
    right = rms_reference.backward(dy, None, x, weight, rstd, False)
    torch.testing.assert_close(apex.rms_backward(dy, None, x, weight, rstd, False), right)
    y, mean, rstd = apex.layer_forward(x, weight, bias, 1e-5)
    torch.testing.assert_close((y, mean, rstd), layer_reference.forward(x, weight, bias, 1e-5))
    right = layer_reference.backward(dy, None, x, weight, mean, rstd)
    torch.testing.assert_close(apex.layer_backward(dy, None, x, weight, mean, rstd), right)


def test_reasons_of_apex() -> None:
    x, weight, rstd = random(3, 8), torch.ones(8), torch.ones(3)
    if DEVICE == "cpu":
        assert apex.supports_rms(x, weight, 1e-6, False) == "runs on GPUs, a tensor is on cpu"
    assert apex.supports_rms(x, weight, 1e-6, True) == "has no zero-centred weight"
    assert "not torch.bfloat16" in (apex.supports_rms(x, weight.bfloat16(), 1e-6, False) or "")
    assert apex.supports_rms_backward(x, x, x, weight, rstd, False) == "has no fused residual"
    assert apex.supports_layer(x, weight, None, 1e-5) == "needs a bias"
    assert apex.supports_layer_backward(x, x, x, weight, rstd, rstd) == "has no fused residual"


def test_nothing_chooses_them_and_forcing_says_what_is_missing() -> None:
    chosen = {name for names in backend.PREFERENCE.values() for name in names}
    assert not chosen & {*FLASH, "apex"}
    if apex.MODULE in sys.modules or DEVICE != "cpu":
        return
    with mk.use_backend("apex"), pytest.raises(ValueError, match=r"fused_layer_norm_cuda does not import"):
        mk.rms_norm(random(3, 8), torch.ones(8))
    with (
        mk.use_backend("flash_attn"),
        pytest.raises(ValueError, match=r"flash_attn: takes bfloat16 and float16"),
    ):
        mk.attention(random(1, 4, 2, 8), random(1, 4, 2, 8), random(1, 4, 2, 8))
