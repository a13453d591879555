"""Chunk plan of the fused output projection and cross-entropy, shared by every backend.

The logits [T, V] never exist whole: a chunk of rows is projected into one workspace, turned into loss and
gradient in place by a row kernel, and consumed by two more products before the next chunk comes. Of a weight
[rows, H] the first `valid_rows` rows are the vocabulary (or this shard of it); the others are padding, which
takes no part and gets zero gradients.

A row kernel gets logits whose rows may be further apart than they are long, and is one of
    loss(logits, target, *options) -> (loss, lse)
    stats(logits, target, start, *options) -> [4, rows]
    loss_and_grad(logits, target, scale, *options) -> (loss, lse), the logits overwritten with their gradient
    grad(logits, target, lse, scale, start, vocabulary, *options), the same without computing the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalite_kernels.reference.common import wide_dtype

RowKernel = Callable[..., Any]
AddProduct = Callable[..., None]
"""As `add_product_`."""
Product = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], None]
"""As `product_`."""


def product_(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
    """`out = left @ right + bias`."""
    if bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias, left, right, out=out)


ROW_ALIGNMENT = 64
"""Elements that the workspace's rows start at multiples of: products on a GPU want 16 bytes, and a vocabulary of
50,257 would not give them."""

PIECE_BYTES = 4 << 20
"""A weight gradient that needs a temporary is made in pieces of this size, which stay in cache."""


class ChunkLimits(NamedTuple):
    """How many rows a chunk should have on a device, and how large its workspace may be."""

    rows: int
    workspace_bytes: int
    least_rows: int


CPU_LIMITS = ChunkLimits(1024, 64 << 20, 128)
"""Each chunk moves about 16 V H bytes of weight, its gradient and the fp32 accumulator, and does 6 C V H
operations: at 430 GFLOP/s against 13 GB/s (a 2-core Zen 4) C = 88 balances them, so with 1024 rows the traffic
costs under a tenth. A vocabulary of 256k gets 128 rows in bf16."""

CUDA_BALANCE = {(8, 0): 153, (9, 0): 295, (10, 0): 281}
"""bf16 FLOP per byte of device memory: A100 312 TFLOP/s at 2.04 TB/s, H100 989 at 3.35, B200 2250 at 8.0."""

OTHER_BALANCE = 300
"""For devices that are not listed; more than MI300X's 1307 TFLOP/s at 5.3 TB/s (247)."""

CUDA_WORKSPACE_BYTES = 1 << 30


def cuda_limits(balance: int) -> ChunkLimits:
    """Chunk of a GPU that does `balance` operations in the time of moving one byte.

    The weight gradient's product does 2 C V H operations and reads and writes an fp32 accumulator, 8 V H bytes:
    it is at its balance with C = 4 * balance rows (1180 on an H100, where the two other products need 300). Twice
    that is taken, 2360 rows, so that the accumulator costs half the product's time even if nothing overlaps. The
    workspace stops growing at 1 GiB (V = 256k: 2048 rows), but never below the balance.
    """
    return ChunkLimits(8 * balance, CUDA_WORKSPACE_BYTES, 4 * balance)


def device_limits(device: torch.device) -> ChunkLimits:
    """The chunk limits of a device."""
    if device.type != "cuda":
        return CPU_LIMITS
    capability = None if torch.version.hip else torch.cuda.get_device_capability(device)
    return cuda_limits(CUDA_BALANCE.get(capability, OTHER_BALANCE) if capability else OTHER_BALANCE)


def chunk_rows(tokens: int, vocabulary: int, itemsize: int, limits: ChunkLimits = CPU_LIMITS) -> int:
    """Rows a chunk holds: all chunks about equal, a multiple of 128 where there are several."""
    fitting = limits.workspace_bytes // max(1, vocabulary * itemsize) // 128 * 128
    most = max(1, min(limits.rows, max(limits.least_rows, fitting)))
    if tokens <= most:
        return max(1, tokens)
    share = math.ceil(tokens / math.ceil(tokens / most))
    return min(most, math.ceil(share / 128) * 128)


def losses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    valid_rows: int,
    *options: Any,
    row_kernel: RowKernel,
    product: Product = product_,
) -> tuple[Tensor, Tensor]:
    """(loss, lse), each [T] in the wide dtype; the row kernel is of the kind `loss`."""
    loss, lse = (x.new_empty(x.shape[0], dtype=wide_dtype(x)) for _ in range(2))
    for part, logits in _chunks(x, weight, bias, valid_rows, product):
        loss[part], lse[part] = row_kernel(logits, target[part], *options)
    return loss, lse


def shard_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    start: int,
    valid_rows: int,
    *options: Any,
    row_kernel: RowKernel,
    product: Product = product_,
) -> Tensor:
    """What a shard adds to the loss, [4, T] in the wide dtype; the row kernel is of the kind `stats`."""
    stats = x.new_empty(4, x.shape[0], dtype=wide_dtype(x))
    for part, logits in _chunks(x, weight, bias, valid_rows, product):
        stats[:, part] = row_kernel(logits, target[part], start, *options)
    return stats


def grads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    valid_rows: int,
    *options: Any,
    row_kernel: RowKernel,
    add_product: AddProduct | None = None,
    product: Product = product_,
    main_grad: Tensor | None = None,
    add: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [T], dx like x, dweight [rows, H] and dbias [rows] in the wide dtype; dbias is empty without a bias).

    The gradients are those of `sum(scale * loss)`, scale being a scalar or [T]; the row kernel is of the kind
    `loss_and_grad`, add_product is `add_product_` or something faster. With `main_grad` dweight is that tensor,
    added into or, without `add`, overwritten.
    """
    loss = x.new_empty(x.shape[0], dtype=wide_dtype(x))
    sums = _Gradients(x, weight, bias, valid_rows, main_grad, add_product or add_product_, product, add)
    for part, logits in _chunks(x, weight, bias, valid_rows, product):
        loss[part] = row_kernel(logits, target[part], _rows_of(scale, part), *options)[0]
        sums.add(part, logits)
    return loss, sums.dx, sums.dweight, sums.dbias


def grads_into(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    main_grad: Tensor,
    add: bool,
    *rest: Any,
    row_kernel: RowKernel,
    add_product: AddProduct | None = None,
    product: Product = product_,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dbias) as `grads`; the weight's gradient is added into `main_grad`, or overwrites it."""
    kernels: dict[str, Any] = {"row_kernel": row_kernel, "add_product": add_product, "product": product}
    loss, dx, _, dbias = grads(x, weight, bias, target, scale, *rest, **kernels, main_grad=main_grad, add=add)
    return loss, dx, dbias


def shard_grads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    scale: Tensor,
    start: int,
    valid_rows: int,
    vocabulary: int,
    *options: Any,
    row_kernel: RowKernel,
    add_product: AddProduct | None = None,
    product: Product = product_,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) as `grads`, from the lse over the whole vocabulary; dx is this shard's part of a sum.

    With `main_grad` dweight is that tensor, added into. The row kernel is of the kind `grad`.
    """
    sums = _Gradients(x, weight, bias, valid_rows, main_grad, add_product or add_product_, product)
    for part, logits in _chunks(x, weight, bias, valid_rows, product):
        row_kernel(logits, target[part], lse[part], _rows_of(scale, part), start, vocabulary, *options)
        sums.add(part, logits)
    return sums.dx, sums.dweight, sums.dbias


def shard_grads_into(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    scale: Tensor,
    main_grad: Tensor,
    *rest: Any,
    row_kernel: RowKernel,
    add_product: AddProduct | None = None,
    product: Product = product_,
) -> tuple[Tensor, Tensor]:
    """(dx, dbias) as `shard_grads`; the weight's gradient is added into `main_grad`."""
    kernels: dict[str, Any] = {"row_kernel": row_kernel, "add_product": add_product, "product": product}
    dx, _, dbias = shard_grads(x, weight, bias, target, lse, scale, *rest, **kernels, main_grad=main_grad)
    return dx, dbias


def add_product_(total: Tensor, dlogits: Tensor, x: Tensor, *, first: bool) -> None:
    """`total += dlogits.T @ x`, or `total = dlogits.T @ x` for the first chunk of a fresh accumulator."""
    left = dlogits.t()
    if total.dtype == x.dtype:
        torch.addmm(total, left, x, beta=0 if first else 1, out=total)
        return
    rows = max(1, PIECE_BYTES // max(1, x.shape[1] * x.element_size()))
    for start in range(0, total.shape[0], rows):
        product = torch.mm(left[start : start + rows], x)  # rounded once, then added
        piece = total[start : start + rows]
        piece.copy_(product) if first else piece.add_(product)


class _Gradients:
    """dx, dweight and dbias as they grow chunk by chunk."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        valid_rows: int,
        main_grad: Tensor | None,
        add_product: AddProduct,
        product: Product,
        add: bool = True,
    ) -> None:
        wide = wide_dtype(x)
        self.add_product, self.product = add_product, product
        self.x, self.weight, self.valid_rows = x, weight[:valid_rows], valid_rows
        self.dx = torch.empty_like(x) if valid_rows else torch.zeros_like(x)
        self.dbias = x.new_zeros(0 if bias is None else weight.shape[0], dtype=wide)
        keep = main_grad is not None and add
        self.dweight = torch.empty_like(weight, dtype=wide) if main_grad is None else main_grad
        # The first chunk overwrites it: filling it with zeros would be one more pass.
        self.fresh = not keep and x.shape[0] > 0
        if not keep:
            self.dweight[valid_rows if self.fresh else 0 :] = 0

    def add(self, part: slice, dlogits: Tensor) -> None:
        if not self.valid_rows:
            return
        self.product(self.dx[part], dlogits, self.weight, None)
        self.add_product(self.dweight[: self.valid_rows], dlogits, self.x[part], first=self.fresh)
        self.fresh = False
        if self.dbias.numel():
            self.dbias[: self.valid_rows] += dlogits.sum(0, dtype=self.dbias.dtype)


def _chunks(
    x: Tensor, weight: Tensor, bias: Tensor | None, valid_rows: int, product: Product
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each chunk and their logits [rows, valid_rows], in a workspace that the next chunk takes over."""
    stride = math.ceil(valid_rows / ROW_ALIGNMENT) * ROW_ALIGNMENT
    rows = chunk_rows(x.shape[0], stride, x.element_size(), device_limits(x.device))
    workspace = x.new_empty(rows, stride)
    if x.device.type == "cpu":
        # oneDNN's bf16 product for AMX reads columns beyond the last and multiplies them by 0: no NaN may be there.
        workspace[:, valid_rows:] = 0
    columns = weight[:valid_rows].t()
    for start in range(0, x.shape[0], rows):
        part = slice(start, min(start + rows, x.shape[0]))
        logits = workspace[: part.stop - start, :valid_rows]
        product(logits, x[part], columns, None if bias is None else bias[:valid_rows])
        yield part, logits


def _rows_of(scale: Tensor, part: slice) -> Tensor:
    return scale[part] if scale.dim() else scale
