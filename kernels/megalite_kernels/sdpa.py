"""Attention on the CPU through torch's own blocked kernel, with documents gathered into few calls.

Documents of packed input are grouped by length rounded up to a power of two; each group is one call. A group
whose documents have one length and lie side by side is a view, the others are gathered, short ones padded with
copies of their own last token: causality hides the padding, so no document ever reads another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalite_kernels.reference.attention import Bounds, documents, visible


def supports_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int,
    offset: int,
    max_seqlen: int,
    softcap: float,
    scale: float,
) -> str | None:
    """None if torch's CPU kernel can do it, else the reason."""
    if q.device.type != "cpu":
        return "is used on the CPU only"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32, not {q.dtype}"
    if softcap or sinks is not None:
        return "has no softcap and no sinks"
    if cu_seqlens_k is not None:
        return "has no document bounds of their own for keys"
    if offset < 0 or (offset and window):
        return f"takes no offset of {offset} with window {window}: queries may see no key"
    if not q.numel() or not k.numel():
        return "takes no empty tensors"
    if (causal or window) and q.shape[-3] > k.shape[-3] + offset:
        return "takes no queries that see no key"
    return None


def supports_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> str | None:
    """As `supports_forward`; the log-sum-exp gets no gradient either."""
    if dlse is not None:
        return "has no gradient through the log-sum-exp"
    return supports_forward(q, k, v, *rest[2:])  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class _Group:
    """Documents that go through one call: `count` of `length` tokens, from `start` on or at `index`."""

    count: int
    length: int
    start: int
    index: Tensor | None = None
    """[count * length] token of every place, padding repeats the document's last token."""
    places: Tensor | None = None
    """Places that are no padding; None if there is none."""

    def take(self, x: Tensor) -> Tensor:
        """[T, heads, D] to [count, heads, length, D]."""
        if self.index is None:
            rows = x[self.start : self.start + self.count * self.length]
        else:
            rows = x.index_select(0, self.index)
        return rows.unflatten(0, (self.count, self.length)).transpose(1, 2)

    def take_grad(self, dout: Tensor) -> Tensor:
        """As `take`, with zeros at the padding: padded queries must not reach dk and dv."""
        if self.places is None or self.index is None:
            return self.take(dout)
        rows = dout.new_zeros((self.count * self.length, *dout.shape[1:]))
        rows[self.places] = dout.index_select(0, self.index[self.places])
        return rows.unflatten(0, (self.count, self.length)).transpose(1, 2)

    def put(self, target: Tensor, value: Tensor) -> None:
        """[count, heads, length, ...] into its tokens of target [T, heads, ...]."""
        rows = value.transpose(1, 2).flatten(0, 1)
        if self.index is None:
            target[self.start : self.start + self.count * self.length] = rows
        elif self.places is None:
            target.index_copy_(0, self.index, rows)
        else:
            target.index_copy_(0, self.index[self.places], rows[self.places])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int,
    offset: int,
    max_seqlen: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Backend "sdpa" of `attention_fwd`."""
    out, masking = torch.empty(q.shape, dtype=q.dtype), (causal, window, offset)
    if cu_seqlens is None:
        value, lse = _call(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), masking, scale)
        out.transpose(1, 2).copy_(value)
        return out, lse.contiguous()
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    for group in _groups(cu_seqlens, q.shape[0], pad=causal and not offset):
        value, one_lse = _call(group.take(q), group.take(k), group.take(v), masking, scale)
        group.put(out, value)
        group.put(lse, one_lse)
    return out, lse.t().contiguous()


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int,
    offset: int,
    max_seqlen: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backend "sdpa" of `attention_bwd`."""
    grads, masking = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)], (causal, window, offset)
    if cu_seqlens is None:
        tensors = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
        values = _call_backward(tensors, lse, masking, scale)
        for grad, value in zip(grads, values, strict=False):
            grad.transpose(1, 2).copy_(value)
        return grads[0], grads[1], grads[2], q.new_zeros(0)
    by_token = lse.t()
    for group in _groups(cu_seqlens, q.shape[0], pad=causal and not offset):
        tensors = [group.take_grad(dout), *(group.take(x) for x in (q, k, v, out))]
        one_lse = group.take(by_token.unsqueeze(-1)).squeeze(-1).contiguous()
        values = _call_backward(tensors, one_lse, masking, scale)
        for grad, value in zip(grads, values, strict=False):
            group.put(grad, value)
    return grads[0], grads[1], grads[2], q.new_zeros(0)


def _groups(cu_seqlens: Tensor, tokens: int, *, pad: bool) -> list[_Group]:
    """Documents by length (rounded up to a power of two where padding is hidden by causality and no offset)."""
    by_length: dict[int, list[slice]] = {}
    for part, _ in documents(Bounds(cu_seqlens), tokens, tokens):
        length = part.stop - part.start
        by_length.setdefault(1 << (length - 1).bit_length() if pad else length, []).append(part)
    return [_group(parts) for parts in by_length.values()]


def _group(parts: list[slice]) -> _Group:
    starts = torch.tensor([part.start for part in parts])
    lengths = torch.tensor([part.stop - part.start for part in parts])
    longest = int(lengths.max())
    count, one_length = len(parts), bool((lengths == longest).all())
    if one_length and parts[-1].stop - parts[0].start == count * longest:
        return _Group(count, longest, parts[0].start)
    offset = torch.arange(longest).expand(count, longest)
    index = (starts.unsqueeze(1) + torch.minimum(offset, lengths.unsqueeze(1) - 1)).flatten()
    places = None if one_length else (offset < lengths.unsqueeze(1)).flatten().nonzero().squeeze(1)
    return _Group(count, longest, parts[0].start, index, places)


def _mask(q: Tensor, k: Tensor, masking: tuple[bool, int, int]) -> tuple[bool, Tensor | None]:
    """(is_causal, additive mask): the kernel's own causal mask is top-left, right only for equal lengths.

    masking is (causal, window, offset).
    """
    causal, window, offset = masking
    rows, columns = q.shape[2], k.shape[2]
    windowed = 0 < window < columns
    if not windowed and not offset and rows == columns:
        return causal, None
    seen = visible(rows, columns, causal, window, q.device, offset)
    if seen is None or bool(seen.all()):
        return False, None
    return False, torch.zeros(rows, columns, dtype=q.dtype).masked_fill_(~seen, -torch.inf)


def _call(
    q: Tensor, k: Tensor, v: Tensor, masking: tuple[bool, int, int], scale: float
) -> tuple[Tensor, Tensor]:
    is_causal, mask = _mask(q, k, masking)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
    )


def _call_backward(
    tensors: list[Tensor], lse: Tensor, masking: tuple[bool, int, int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """tensors are dout, q, k, v, out."""
    dout, q, k, v, out = tensors
    is_causal, mask = _mask(q, k, masking)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale
    )
