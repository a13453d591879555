"""Checks at the public edge: each names the value, the limit, and what to do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are dense tensors of torch's own classes: no sharded, quantised, nested or sparse ones."""
    return all(
        t is None or (type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and not t.is_nested)
        for t in tensors
    )


def require_float(**tensors: Tensor) -> None:
    """Each tensor is bf16, fp16, fp32 or fp64."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} has dtype {tensor.dtype}: pass bfloat16, float16, float32 or float64")


def require_shape(tensor: Tensor, shape: tuple[int, ...], name: str, why: str) -> None:
    """`tensor` has exactly this shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, but {why} needs {list(shape)}")


def require_like(tensor: Tensor, other: Tensor, name: str, other_name: str) -> None:
    """Both tensors agree in shape, dtype and device."""
    require_shape(tensor, tuple(other.shape), name, f"the shape of {other_name}")
    require_same_kind(tensor, other, name, other_name)


def require_same_kind(tensor: Tensor, other: Tensor, name: str, other_name: str) -> None:
    """Both tensors agree in dtype and device."""
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name} is {tensor.dtype} but {other_name} is {other.dtype}: cast one of them")
    require_same_device(tensor, other, name, other_name)


def require_same_device(tensor: Tensor, other: Tensor, name: str, other_name: str) -> None:
    """Both tensors live on the same device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device} but {other_name} is on {other.device}: move one of them"
        )


def require_option(value: object, allowed: tuple[object, ...], name: str) -> None:
    """`value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known: use one of {', '.join(map(repr, allowed))}")


def require_range(value: float, name: str, *, low: float = 0.0, high: float = float("inf")) -> None:
    """low <= value <= high (NaN is refused)."""
    if not low <= value <= high:
        limit = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise ValueError(f"{name}={value} must be {limit}")
