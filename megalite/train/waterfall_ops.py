"""What kind of work each op is, and how many FLOPs of the model it does: one table, one line for a new op.

Names are those of torch's dispatcher without the overload ("aten.mm"). An op that the table does not know is a view
(it moves nothing), a point-wise op (torch tags them), or of no kind: then it is reported by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

GEMM, ATTENTION, HEAD, MEMORY, OPTIMIZER = "gemm", "attention", "head", "memory", "optimizer"
COMMUNICATION, HOST, OTHER, NONE = "communication", "host", "other", "none"
"""Kinds of ops. `NONE` is a mark in the stream of ops that costs nothing to speak of."""
FP8_PRODUCT = "megalite.fp8_product"
"""Held to a peak of its own."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of the model and the batch the FLOPs of an op depend on."""

    seq_length: int
    """Keys that a query is counted against by the convention, whatever document boundaries leave of them."""
    vocab_rows: frozenset[int] = frozenset()
    """Rows of this rank's part of the vocabulary, with and without padding."""
    tokens: frozenset[int] = field(default_factory=frozenset)
    """Sizes of a micro-batch, which must not be taken for a vocabulary of the same size."""


Flops = Callable[[Sequence[Any], Sizes], float]
"""(arguments of the op, sizes) → FLOPs of the model that it does."""


def _product(left: int, right: int) -> Flops:
    """Arguments `left` [.., m, k] and `right` [.., k, n]."""
    return lambda args, sizes: 2.0 * args[left].numel() * args[right].shape[-1]


def _linear(args: Sequence[Any], sizes: Sizes) -> float:
    """x [.., I] and weight [O, I]."""
    return 2.0 * args[0].numel() * args[1].shape[0]


def _fp8(args: Sequence[Any], sizes: Sizes) -> float:
    """a [M, K] and b [N, K], each followed by its scale."""
    return 2.0 * args[0].numel() * args[2].shape[0]


def _dgrad(args: Sequence[Any], sizes: Sizes) -> float:
    """dy [.., O] and weight [O, I]."""
    return 2.0 * args[0].numel() * args[1].shape[-1]


def _wgrad(args: Sequence[Any], sizes: Sizes) -> float:
    """dy [T, O] and x [T, I]."""
    return 2.0 * args[0].numel() * args[1].shape[-1]


def _head(per_weight: float) -> Flops:
    """x [T, H] and weight [V, H], of which `valid_rows` are the vocabulary: padding is not counted."""

    def flops(args: Sequence[Any], sizes: Sizes) -> float:
        x, weight = args[0], args[1]
        rows = min(weight.shape[0], *(a for a in args[4:] if _is_rows(a, sizes)), weight.shape[0])
        return per_weight * x.numel() * rows

    return flops


def _is_rows(value: Any, sizes: Sizes) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in sizes.vocab_rows


def _attention(query: int, passes: float) -> Flops:
    """Queries [.., N, D] against all keys of the sequence (or the window), halved: the causal convention.

    The backward pass is counted as twice the forward, though it makes the scores once more.
    """

    def flops(args: Sequence[Any], sizes: Sizes) -> float:
        q, window = args[query], args[-5]
        keys = min(sizes.seq_length, window) if isinstance(window, int) and window > 0 else sizes.seq_length
        return passes * 0.5 * 4.0 * q.numel() * keys

    return flops


def _packed_attention(qkv: int, passes: float) -> Flops:
    """As `_attention`, of queries that are N of the N + 2K heads side by side; N and K stand before the options."""

    def flops(args: Sequence[Any], sizes: Sizes) -> float:
        heads, kv_heads, window = args[-8], args[-7], args[-5]
        keys = min(sizes.seq_length, window) if window > 0 else sizes.seq_length
        return passes * 0.5 * 4.0 * keys * args[qkv].numel() * heads / (heads + 2 * kv_heads)

    return flops


@dataclass(frozen=True, slots=True)
class Op:
    """One line of the table."""

    kind: str
    flops: Flops | None = None


_MM, _ADDMM = Op(GEMM, _product(0, 1)), Op(GEMM, _product(1, 2))
_MEMORY, _HOST, _LOSS = Op(MEMORY), Op(HOST), Op(HEAD)

TABLE: dict[str, Op] = {
    # Matrix products.
    "aten.mm": _MM,
    "aten.bmm": _MM,
    "aten._scaled_mm": _MM,
    "aten.addmm": _ADDMM,
    "aten.addmm_": _ADDMM,
    "aten.baddbmm": _ADDMM,
    "aten.linear": Op(GEMM, _linear),
    "megalite.linear_fwd": Op(GEMM, _linear),
    "megalite.linear_dgrad": Op(GEMM, _dgrad),
    "megalite.linear_weight_grad": Op(GEMM, _wgrad),
    "megalite.linear_weight_grad_": Op(GEMM, _wgrad),
    FP8_PRODUCT: Op(GEMM, _fp8),
    # Attention.
    "megalite.attention_fwd": Op(ATTENTION, _attention(0, 1.0)),
    "megalite.attention_bwd": Op(ATTENTION, _attention(2, 2.0)),
    "megalite.packed_attention_fwd": Op(ATTENTION, _packed_attention(0, 1.0)),
    "megalite.packed_attention_bwd": Op(ATTENTION, _packed_attention(1, 2.0)),
    # The loss head. Whatever a pass computes again, the model's own FLOPs are 2 per weight forward and 4 backward.
    "megalite.linear_cross_entropy_fwd": Op(HEAD, _head(2.0)),
    "megalite.linear_cross_entropy_local_fwd": Op(HEAD, _head(2.0)),
    "megalite.linear_cross_entropy_bwd": Op(HEAD, _head(4.0)),
    "megalite.linear_cross_entropy_bwd_": Op(HEAD, _head(4.0)),
    "megalite.linear_cross_entropy_grad": Op(HEAD, _head(6.0)),
    "megalite.linear_cross_entropy_grad_": Op(HEAD, _head(6.0)),
    "megalite.cross_entropy_fwd": _LOSS,
    "megalite.cross_entropy_bwd": _LOSS,
    "megalite.cross_entropy_grad_": _LOSS,
    "megalite.cross_entropy_local_fwd": _LOSS,
    "megalite.cross_entropy_local_bwd": _LOSS,
    "megalite.cross_entropy_local_bwd_": _LOSS,
    "megalite.scaled_copy": _LOSS,
    # The optimizer.
    "megalite.adamw_": Op(OPTIMIZER),
    "megalite.adamw_remainder_": Op(OPTIMIZER),
    "megalite.adamw_stochastic_": Op(OPTIMIZER),
    "megalite.grad_norm": Op(OPTIMIZER),
    "megalite.grad_norms": Op(OPTIMIZER),
    # One pass over memory each.
    **dict.fromkeys(
        (
            *("megalite." + name for name in (
                "activation_fwd", "activation_bwd", "activation_bwd_again_", "glu_fwd", "glu_bwd", "glu_bwd_again_",
                "glu_pair_fwd", "glu_pair_bwd", "embedding_bwd", "embedding_bwd_", "layer_norm_fwd",
                "layer_norm_residual_fwd", "layer_norm_bwd", "layer_norm_bwd_again", "rms_norm_fwd",
                "rms_norm_residual_fwd", "rms_norm_bwd", "rms_norm_bwd_again", "rope_fwd", "rope_", "rope_norm_fwd",
                "rope_norm_bwd", "fp8_cast", "fp8_cast_transposed", "fp8_quantize_columns", "fp8_quantize_rows",
                "fp8_tensor_scale", "fp8_rms_norm_fwd", "fp8_rms_norm_residual_fwd", "fp8_layer_norm_fwd",
                "fp8_layer_norm_residual_fwd", "fp8_activation_fwd", "fp8_glu_fwd",
            )),
            *("fsdp." + name for name in ("all_gather_copy_in", "chunk_cat", "split_with_sizes_copy")),
            *("aten." + name for name in (
                "_foreach_add_", "_foreach_copy_", "_foreach_mul_", "_foreach_norm", "_foreach_zero_",
                "_fused_rms_norm", "_assert_async",
                "_fused_rms_norm_backward", "_softmax", "_softmax_backward_data", "_to_copy", "_unsafe_index", "all",
                "amax", "amin", "any", "arange", "argmax", "argmin", "cat", "clone", "contiguous", "copy_", "cumsum",
                "dot", "embedding", "embedding_dense_backward", "fill_", "full", "full_like", "gather", "index",
                "index_add_", "index_fill_", "index_put_", "index_select", "linalg_vector_norm", "logsumexp",
                "masked_fill", "masked_fill_", "masked_select", "max", "mean", "min", "native_layer_norm",
                "native_layer_norm_backward", "nonzero", "norm", "ones", "ones_like", "repeat", "repeat_interleave",
                "roll", "scalar_tensor", "scatter_", "scatter_add_", "searchsorted", "slice_backward",
                "slice_scatter", "sort", "split_with_sizes_copy", "stack", "sum", "var_mean", "where", "zero_",
                "zeros", "zeros_like", "constant_pad_nd", "bincount", "flip", "new_zeros", "new_ones", "new_full",
                "_chunk_cat",
            )),
        ),
        _MEMORY,
    ),
    # Nothing on the device: memory is found, a number is read, a view is made.
    **dict.fromkeys(
        (
            "aten." + name for name in (
                "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "empty", "empty_like", "empty_strided",
                "equal",
                "is_same_size", "new_empty", "new_empty_strided", "promote_types", "result_type", "resize_", "set_",
                "item", "can_cast", "is_pinned", "_pin_memory", "record_stream",
            )
        ),
        _HOST,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Classified:
    """One call of an op."""

    name: str
    kind: str
    flops: float = 0.0
    bytes: float = 0.0


def op_name(func: Any) -> str:
    """``aten.mm`` of the dispatcher's aten::mm.default."""
    space, _, rest = str(func.name()).partition("::")
    return f"{space}.{rest.partition('.')[0]}"


def kind_of(name: str, func: Any = None) -> Op:
    """The line of the table, or what torch says about the op; kind `OTHER` where neither knows it."""
    known = TABLE.get(name)
    if known is not None:
        return known
    space = name.partition(".")[0]
    if space in ("c10d", "_c10d_functional", "c10d_functional"):
        return Op(COMMUNICATION)
    if space == "profiler":
        return Op(NONE)
    if func is not None and getattr(func, "is_view", False):
        return _HOST
    if func is not None and torch.Tag.pointwise in getattr(func, "tags", ()):
        return _MEMORY
    return Op(OTHER)


class Classifier:
    """Kind, FLOPs and floor of bytes of each call of an op."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._known: dict[Any, tuple[str, Op, tuple[int, ...]]] = {}

    def __call__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Classified:
        """Of one call; bytes count each input read once and each output written once, as the contracts do."""
        if func not in self._known:
            name = op_name(func)
            self._known[func] = (name, kind_of(name, func), _written(func))
        name, op, written = self._known[func]
        if op.kind in (HOST, NONE):
            return Classified(name, op.kind)
        flops = op.flops(args, self.sizes) if op.flops else 0.0
        moved = float(sum(map(_bytes, tensors_in(args))) + sum(map(_bytes, tensors_in(kwargs.values()))))
        moved += sum(_bytes(x) for x in tensors_in(args[i] for i in written if i < len(args)))
        if not written:
            moved += sum(map(_bytes, tensors_in((out,))))
        kind = HEAD if op.kind == MEMORY and self._of_vocabulary(args, out) else op.kind
        return Classified(name, kind, flops, moved)

    def _of_vocabulary(self, args: Sequence[Any], out: Any) -> bool:
        """Copies, sums and fills of a matrix as high as the vocabulary: what the head leaves to torch."""
        rows = self.sizes.vocab_rows - self.sizes.tokens
        return any(x.dim() == 2 and x.shape[0] in rows for x in tensors_in((args, out)))


def tensors_in(values: Any) -> Iterator[Tensor]:
    """All tensors of nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def _bytes(x: Tensor) -> int:
    """Of what a tensor really has: an expanded one is read once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count * x.element_size()


def _written(func: Any) -> tuple[int, ...]:
    """Places of the arguments that an op overwrites."""
    arguments = func._schema.arguments
    return tuple(
        i
        for i, a in enumerate(arguments)
        if a.alias_info is not None and a.alias_info.is_write and not a.kwarg_only
    )
