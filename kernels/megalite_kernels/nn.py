"""Drop-in modules with torch's names, arguments and state_dict keys, running on the fused ops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalite_kernels.ops.activation import geglu, gelu, swiglu
from megalite_kernels.ops.layer_norm import layer_norm
from megalite_kernels.ops.linear import linear
from megalite_kernels.ops.linear_cross_entropy import linear_cross_entropy
from megalite_kernels.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """`rms_norm` over the last dim; parameter `weight` [hidden_size].

    Args:
        hidden_size: features per row.
        eps: added to the mean square.
        zero_centered: the gain is `1 + weight`, and weight starts at 0.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        zero_centered: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        start = torch.zeros if zero_centered else torch.ones
        self.weight = nn.Parameter(start(hidden_size, dtype=dtype, device=device))
        self.eps, self.zero_centered = eps, zero_centered

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """y like x [..., H]; with a residual (y, x + residual)."""
        return rms_norm(x, self.weight, self.eps, residual=residual, zero_centered=self.zero_centered)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, zero_centered={self.zero_centered}"


class LayerNorm(nn.Module):
    """`layer_norm` over the last dim; parameters `weight` and, unless bias=False, `bias` [hidden_size]."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=dtype, device=device)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """y like x [..., H]; with a residual (y, x + residual)."""
        return layer_norm(x, self.weight, self.bias, self.eps, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, bias={self.bias is not None}"


class Linear(nn.Linear):
    """`linear` as a module: torch's Linear, with the native library's products where they are faster."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return linear(input, self.weight, bias=self.bias)


class SwiGLU(nn.Module):
    """The gated MLP `down(silu(gate(x)) * up(x))`, gate and up being one product.

    Args:
        hidden_size: H.
        ffn_hidden_size: F; `gate_up` is [2F, H], gate first, `down` is [H, F].
        bias: biases on both.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * ffn_hidden_size, bias=bias, dtype=dtype, device=device)
        self.down = Linear(ffn_hidden_size, hidden_size, bias=bias, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        return self.down(swiglu(self.gate_up(x)))


class GEGLU(SwiGLU):
    """As `SwiGLU` with GELU in its tanh form: `down(gelu(gate(x)) * up(x))`, the MLP of Gemma."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        return self.down(geglu(self.gate_up(x)))


class GELU(nn.Module):
    """`gelu` as a module; arguments and default as torch's: approximate is "none" (exact) or "tanh"."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """Like x."""
        return gelu(x, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class LinearCrossEntropy(nn.Module):
    """Output head and loss in one; parameter `weight` [vocab_size, hidden_size], as a Linear's.

    Args:
        hidden_size, vocab_size: H and V.
        options: keyword options of `linear_cross_entropy` (ignore_index, label_smoothing, z_loss, softcap,
            reduction).
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: float | int | str | None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype, device=device))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)
        self.options = options

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Loss of hidden states [..., H] and targets [...]."""
        return linear_cross_entropy(x, self.weight, target, **self.options)  # type: ignore[arg-type]
