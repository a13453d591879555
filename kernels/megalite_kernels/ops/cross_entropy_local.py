"""Cross-entropy over a vocabulary that is divided among several devices, with one collective.

Each device holds the logits of its own classes. It computes four numbers per token, all devices exchange them in
one all-gather, each combines them to the same loss and logsumexp, and makes the gradient of its own logits:

    stats = cross_entropy_local(logits, target, vocab_start=start)             # [4, T]
    every = all_gather(stats)                                                  # [shards, 4, T]
    loss, lse = cross_entropy_combine(every, target, vocab_size=V)             # [T] each, the same everywhere
    dlogits = cross_entropy_grad(logits, target, lse, scale, vocab_start=start, vocab_size=V)

No function here knows of processes or has an autograd formula: the caller's does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalite_kernels._library import define
from megalite_kernels.ops import checks
from megalite_kernels.ops.cross_entropy import (
    OPTIONS_SCHEMA,
    check_target,
    loss_options,
    register_backends,
)
from megalite_kernels.reference import cross_entropy as reference
from megalite_kernels.reference.common import wide_dtype
from megalite_kernels.reference.cross_entropy import LossOptions


class Shard(NamedTuple):
    """Which classes the columns are: `valid_rows` of them, from `vocab_start` on, of `vocab_size`."""

    vocab_start: int
    valid_rows: int
    vocab_size: int


def cross_entropy_local(
    logits: Tensor,
    target: Tensor,
    *,
    vocab_start: int = 0,
    valid_rows: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """What one shard of the vocabulary adds to the loss of each token.

    With s the logits of the shard's classes (after the soft-cap): m = max(s), sum(exp(s - m)), s at the target
    (0 where another shard owns it, or the token is ignored), and sum(s) (0 without label smoothing).

    Args:
        logits: [T, C], bf16, fp16, fp32 or fp64; column j is class vocab_start + j.
        target: [T], int64 classes of the whole vocabulary.
        vocab_start: class of the first column.
        valid_rows: columns that are classes, the others being padding; None: all, 0: none.
        ignore_index, label_smoothing, z_loss, softcap: as in `cross_entropy`.

    Returns:
        [4, T] fp32 (fp64 for fp64 logits): one tensor, so that one all-gather carries it.

    Raises:
        ValueError: shapes, dtypes, devices or an option is out of its range.

    Saved: nothing; there is no autograd formula.
    """
    checks.require_float(logits=logits)
    options = loss_options(ignore_index, label_smoothing, z_loss, softcap)
    _check_rows(logits, target)
    shard = shard_of(vocab_start, valid_rows, None, logits.shape[1], "columns of logits")
    return _local(logits, target, shard.vocab_start, shard.valid_rows, *options)


def cross_entropy_combine(
    stats: Tensor,
    target: Tensor,
    *,
    vocab_size: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and logsumexp over the whole vocabulary, from what all shards found.

    Plain torch on [shards, 4, T]. The order of the shards does not matter, but must be the same everywhere for
    the same bits.

    Args:
        stats: [shards, 4, T] from `cross_entropy_local`.
        target: [T], int64.
        vocab_size: classes of all shards together, without padding.
        ignore_index, label_smoothing, z_loss, softcap: as given to `cross_entropy_local`.

    Returns:
        (loss [T], lse [T]) like stats; the loss is 0 at ignored tokens, NaN where the target is no class.

    Raises:
        ValueError: shapes, devices or an option is out of its range.

    Saved: nothing; there is no autograd formula.
    """
    options = loss_options(ignore_index, label_smoothing, z_loss, softcap)
    if stats.dim() != 3 or stats.shape[1] != 4:
        raise ValueError(f"stats has shape {list(stats.shape)}: stack the [4, T] of all shards")
    check_target(target, (stats.shape[2],), stats, "stats")
    return reference.combine(stats, target, options, vocabulary=vocab_size)


def cross_entropy_grad(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    scale: Tensor,
    *,
    vocab_start: int = 0,
    valid_rows: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Gradient of `sum(scale * loss)` with respect to one shard's logits.

    Args:
        logits: [T, C] as given to `cross_entropy_local`.
        target: [T], int64.
        lse: [T] fp32 over the whole vocabulary, from `cross_entropy_combine`.
        scale: fp32 on the same device, a scalar or [T]: the incoming gradient, with 1/N and the like in it.
        vocab_start, valid_rows: as in `cross_entropy_local`.
        vocab_size: classes of all shards together; None: this is the only shard.
        ignore_index, label_smoothing, z_loss, softcap: as in `cross_entropy`.

    Returns:
        [T, C] like logits; 0 in padding columns and at ignored tokens.

    Raises:
        ValueError: shapes, dtypes, devices or an option is out of its range.

    Saved: nothing; there is no autograd formula.
    """
    shard = shard_of(vocab_start, valid_rows, vocab_size, logits.shape[-1], "columns of logits")
    options = loss_options(ignore_index, label_smoothing, z_loss, softcap)
    check_grad_inputs(logits, target, lse, scale)
    return _grad(logits, target, lse, scale, *shard, *options)


def cross_entropy_grad_(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    scale: Tensor,
    *,
    vocab_start: int = 0,
    valid_rows: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """As `cross_entropy_grad`, written over the logits, which are returned.

    Raises:
        ValueError: as `cross_entropy_grad`, and where the logits' columns are not side by side.
    """
    shard = shard_of(vocab_start, valid_rows, vocab_size, logits.shape[-1], "columns of logits")
    options = loss_options(ignore_index, label_smoothing, z_loss, softcap)
    check_grad_inputs(logits, target, lse, scale)
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits have stride {logits.stride()}: pass contiguous rows, they are overwritten")
    _grad_(logits, target, lse, scale, *shard, *options)
    return logits


def shard_of(vocab_start: int, valid_rows: int | None, vocab_size: int | None, rows: int, what: str) -> Shard:
    """Checked place of a shard: None means all rows, and no other shard."""
    valid = rows if valid_rows is None else valid_rows
    if not 0 <= valid <= rows:
        raise ValueError(f"valid_rows={valid} must be between 0 and the {rows} {what}")
    end = vocab_start + valid if vocab_size is None else vocab_size
    if vocab_start < 0 or (valid and vocab_start + valid > end):
        raise ValueError(
            f"classes {vocab_start} to {vocab_start + valid} are not within vocab_size={end}: check vocab_start "
            "and valid_rows"
        )
    return Shard(vocab_start, valid, end)


def check_grad_inputs(logits: Tensor, target: Tensor, lse: Tensor, scale: Tensor) -> None:
    """What the gradient of a shard takes besides its options."""
    checks.require_float(logits=logits, lse=lse, scale=scale)
    _check_rows(logits, target)
    check_scale(lse, scale, target)


def check_scale(lse: Tensor, scale: Tensor, target: Tensor) -> None:
    """lse has one entry per token, scale one or one per token."""
    tokens = target.shape[0]
    checks.require_shape(lse, (tokens,), "lse", f"target with {tokens} tokens")
    checks.require_same_device(lse, target, "lse", "target")
    if scale.dim():
        checks.require_shape(scale, (tokens,), "scale", f"target with {tokens} tokens")
    checks.require_same_device(scale, target, "scale", "target")


def _check_rows(logits: Tensor, target: Tensor) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits have shape {list(logits.shape)}: flatten them to [tokens, classes]")
    check_target(target, (logits.shape[0],), logits, "logits")


def reference_local(
    logits: Tensor, target: Tensor, vocab_start: int, valid_rows: int, *options: Any
) -> Tensor:
    """Reference of `cross_entropy_local_fwd`."""
    return reference.local(logits[:, :valid_rows], target, LossOptions(*options), start=vocab_start)


def reference_local_grad(
    logits: Tensor, target: Tensor, lse: Tensor, scale: Tensor, *shard_and_options: Any
) -> Tensor:
    """Reference of `cross_entropy_local_bwd`."""
    shard, options = Shard(*shard_and_options[:3]), LossOptions(*shard_and_options[3:])
    dlogits = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    valid = slice(0, shard.valid_rows)
    dlogits[:, valid] = reference.backward(
        scale, logits[:, valid], target, lse, options, start=shard.vocab_start, vocabulary=shard.vocab_size
    )
    return dlogits


def reference_local_grad_(
    logits: Tensor, target: Tensor, lse: Tensor, scale: Tensor, *shard_and_options: Any
) -> None:
    """Reference of `cross_entropy_local_bwd_`."""
    logits.copy_(reference_local_grad(logits, target, lse, scale, *shard_and_options))


SHARD_SCHEMA = "int vocab_start, int valid_rows, int vocab_size"

_local = define(
    f"cross_entropy_local_fwd(Tensor logits, Tensor target, int vocab_start, int valid_rows, {OPTIONS_SCHEMA})"
    " -> Tensor",
    fake=lambda logits, *rest: logits.new_empty(4, logits.shape[0], dtype=wide_dtype(logits)),
)
_grad = define(
    "cross_entropy_local_bwd(Tensor logits, Tensor target, Tensor lse, Tensor scale, "
    f"{SHARD_SCHEMA}, {OPTIONS_SCHEMA}) -> Tensor",
    fake=lambda logits, *rest: logits.new_empty(logits.shape),
)
_grad_ = define(
    "cross_entropy_local_bwd_(Tensor(a!) logits, Tensor target, Tensor lse, Tensor scale, "
    f"{SHARD_SCHEMA}, {OPTIONS_SCHEMA}) -> ()",
    fake=lambda *args: None,
)
register_backends("cross_entropy_local_fwd", reference_local, "local", "cross_entropy:local")
register_backends(
    "cross_entropy_local_bwd", reference_local_grad, "local_backward", "cross_entropy:local_backward"
)
register_backends(
    "cross_entropy_local_bwd_", reference_local_grad_, "local_backward_", "cross_entropy:local_backward_"
)
