"""Recognising, by its values, an attention mask that says no more than "causal"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_plain_causal(mask: Any, rows: int, keys: int, window: int | None) -> bool:
    """Whether a mask hides exactly the later keys, and those outside the window, from every query.

    The mask is boolean (True is seen) or additive (0 is seen, anything under half of the dtype's lowest value is
    hidden), [B or 1, 1, rows, keys]; query i stands at key position i + keys - rows. Reading it waits for the device;
    the answer is kept on the mask, so that a model's layers ask once. While torch.compile traces, values can't be
    read and the answer is no.
    """
    if torch.compiler.is_compiling() or type(mask) is not Tensor:
        return False
    if mask.dim() != 4 or mask.shape[1] != 1 or tuple(mask.shape[2:]) != (rows, keys):
        return False
    known: dict[Any, bool] = mask.__dict__.setdefault("_megalite_causal", {})
    key = (0 if mask.is_inference() else mask._version, window)
    if key not in known:
        known[key] = _equals(mask, rows, keys, window)
    return known[key]


def _equals(mask: Tensor, rows: int, keys: int, window: int | None) -> bool:
    position = torch.arange(rows, device=mask.device)[:, None] + (keys - rows)
    key = torch.arange(keys, device=mask.device)[None, :]
    seen = key <= position
    if window is not None:
        seen &= key > position - window
    if mask.dtype == torch.bool:
        return bool((mask == seen).all())
    if not mask.is_floating_point():
        return False
    lowest = torch.finfo(mask.dtype).min / 2
    return bool((torch.where(seen, mask == 0, mask < lowest)).all())
