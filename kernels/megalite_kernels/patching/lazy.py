"""Logits that are not made until somebody looks at them; the loss needs none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megalite_kernels.ops.linear import linear
from megalite_kernels.ops.linear_cross_entropy import linear_cross_entropy
from megalite_kernels.patching.common import autocast

LOSS_OPTIONS = {"weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing"}


Steps = tuple[tuple[str, float], ...]
"""("mul", c), ("div", c) and ("tanh", 0), in the order they were asked for."""


class LazyLogits:
    """`hidden @ weight.T + bias`, not yet computed.

    Reshaping, slicing of tokens, widening, scaling by numbers and `c * tanh(x / c)` are remembered;
    `torch.nn.functional.cross_entropy` then runs as `linear_cross_entropy`. Any other use (attributes, indexing,
    arithmetic, torch functions) computes the logits once and continues with that tensor, gradients included;
    `materialize()` does so explicitly. It is not a torch.Tensor.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        steps: Steps = (),
    ) -> None:
        self._hidden, self._weight, self._bias = hidden, weight, bias
        self._dtype, self._steps = dtype, steps
        self._value: Tensor | None = None

    def materialize(self) -> Tensor:
        """The logits as a tensor, computed on first use."""
        if self._value is None:
            value = linear(self._hidden, self._weight, bias=self._bias).to(self._dtype)
            for step, number in self._steps:
                value = (
                    torch.tanh(value)
                    if step == "tanh"
                    else value * number
                    if step == "mul"
                    else value / number
                )
            self._value = value
        return self._value

    def _with(self, **changes: Any) -> LazyLogits:
        state = {
            "hidden": self._hidden, "weight": self._weight, "bias": self._bias,
            "dtype": self._dtype, "steps": self._steps,
        }  # fmt: skip
        return LazyLogits(**{**state, **changes})

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Of the logits."""
        return self._hidden.device

    @property
    def shape(self) -> torch.Size:
        """Of the logits, [..., V]."""
        return torch.Size((*self._hidden.shape[:-1], self._weight.shape[0]))

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return self._hidden.dim()

    def dim(self) -> int:
        """Number of dims."""
        return self._hidden.dim()

    def size(self, dim: int | None = None) -> Any:
        """As a tensor's."""
        return self.shape if dim is None else self.shape[dim]

    def view(self, *shape: Any) -> Any:
        """Lazy where the vocabulary stays the last dim."""
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        if not all(isinstance(size, (int, torch.SymInt)) for size in sizes) or not self._keeps_vocabulary(
            sizes
        ):
            return self.materialize().view(*shape)
        return self._with(hidden=self._hidden.reshape(*sizes[:-1], self._hidden.shape[-1]))

    reshape = view

    def _keeps_vocabulary(self, sizes: Any) -> bool:
        if sizes[-1] == self._weight.shape[0]:
            return True
        return bool(sizes[-1] == -1 and all(size != -1 for size in sizes[:-1]) and self._fills(sizes[:-1]))

    def _fills(self, sizes: Any) -> bool:
        rows = 1
        for size in sizes:
            rows = rows * size
        return bool(rows == self._hidden.shape[:-1].numel())

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        """Lazy where the vocabulary stays the last dim."""
        if end_dim in (-1, self.dim() - 1) or start_dim < 0:
            return self.materialize().flatten(start_dim, end_dim)
        return self._with(hidden=self._hidden.flatten(start_dim, end_dim))

    def __getitem__(self, index: Any) -> Any:
        """Lazy where tokens are sliced and the vocabulary is left whole."""
        parts = index if isinstance(index, tuple) else (index,)
        if any(part is Ellipsis for part in parts):
            at = next(i for i, part in enumerate(parts) if part is Ellipsis)
            missing = self.dim() - len(parts) + 1
            parts = (*parts[:at], *(slice(None),) * missing, *parts[at + 1 :])
        tokens, last = parts[: self.dim() - 1], parts[self.dim() - 1 :]
        if all(isinstance(part, slice) for part in tokens) and last in ((), (slice(None),)):
            return self._with(hidden=self._hidden[tokens])
        return self.materialize()[index]

    def contiguous(self, **_: Any) -> LazyLogits:
        """Logits are made contiguous."""
        return self

    def float(self) -> Any:
        """Lazy."""
        return self.to(torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Lazy for a dtype, or the device it is on."""
        if len(args) == 1 and not kwargs:
            if isinstance(args[0], torch.dtype):
                return self._with(dtype=args[0])
            if isinstance(args[0], (str, torch.device)) and torch.device(args[0]) == self.device:
                return self
        return self.materialize().to(*args, **kwargs)

    def tanh(self) -> LazyLogits:
        """Lazy."""
        return self._with(steps=(*self._steps, ("tanh", 0.0)))

    def __mul__(self, other: Any) -> Any:
        """Lazy for numbers."""
        if isinstance(other, (int, float)):
            return self._with(steps=(*self._steps, ("mul", float(other))))
        return self.materialize() * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        """Lazy for numbers."""
        if isinstance(other, (int, float)):
            return self._with(steps=(*self._steps, ("div", float(other))))
        return self.materialize() / other

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.materialize(), name)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __add__(self, other: Any) -> Any:
        return self.materialize() + other

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self.materialize() - other

    def __rsub__(self, other: Any) -> Any:
        return other - self.materialize()

    def __neg__(self) -> Any:
        return -self.materialize()

    def __repr__(self) -> str:
        return f"LazyLogits(shape={list(self.shape)}, dtype={self.dtype}, made={self._value is not None})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.cross_entropy:
            loss = _fused_loss(*args, **kwargs)
            if loss is not None:
                return loss
        if func is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        return func(*(_made(x) for x in args), **{name: _made(x) for name, x in kwargs.items()})


def _linear_loss(
    logits: LazyLogits, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor | None:
    scale, softcap = _as_scale_and_cap(logits._steps)
    if scale is None:
        return None
    hidden, weight = autocast(logits._hidden, logits._weight)
    bias = logits._bias if logits._bias is None else logits._bias.to(weight.dtype)
    if scale != 1.0:
        if bias is not None:
            return None
        hidden = hidden * scale
    loss = linear_cross_entropy(
        hidden,
        weight,
        target,
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        reduction=reduction,
    )
    # Under autocast torch computes this loss in float32.
    return loss if torch.is_autocast_enabled(hidden.device.type) else loss.to(logits.dtype)


def _made(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_made(item) for item in value)
    return value.materialize() if isinstance(value, LazyLogits) else value


def _as_scale_and_cap(steps: Steps) -> tuple[float | None, float | None]:
    """(scale, soft-cap) that the remembered steps amount to; (None, None) for any others."""
    scale, softcap = 1.0, None
    rest = list(steps)
    while rest:
        step, number = rest.pop(0)
        if step == "div" and number > 0 and rest[:2] == [("tanh", 0.0), ("mul", number)] and softcap is None:
            softcap, rest = number, rest[2:]
        elif step in ("mul", "div") and softcap is None and number:
            scale = scale * number if step == "mul" else scale / number
        else:
            return None, None
    return scale, softcap


def _fused_loss(logits: Any, target: Any, *args: Any, **options: Any) -> Tensor | None:
    """`linear_cross_entropy` in the place of cross_entropy(logits, target), or None where it can't be."""
    known = not args and set(options) <= LOSS_OPTIONS
    unused = all(options.get(name) is None for name in ("weight", "size_average", "reduce"))
    if not (known and unused and isinstance(logits, LazyLogits) and isinstance(target, Tensor)):
        return None
    if logits.dim() != 2 or target.dim() != 1 or target.dtype != torch.int64:
        return None
    return _linear_loss(
        logits,
        target,
        options.get("ignore_index", -100),
        options.get("reduction", "mean"),
        options.get("label_smoothing", 0.0),
    )
