"""What a wrong tensor looks like: where in it, on which ranks, and which kind of mistake has that shape."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.train.verify_compare import Check, Measure
from megalite.train.verify_run import Answer, Block, Place

KINDS = {
    "output": "output",
    "output gradient": "gradient by the output",
    "token losses": "losses of single tokens",
    "loss": "loss",
    "gradient": "gradient",
    "grad norm": "gradient norm",
    "update": "change after the steps",
}
_NAMES_SHOWN = 4
_BY_TOKEN = ("output", "output gradient", "token losses")
_HELD_IN = {
    "output": "outputs",
    "output gradient": "output_gradients",
    "gradient": "gradients",
    "update": "weights",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """The first wrong number or tensor of a layout, for people and machines."""

    kind: str
    name: str
    dtype: str
    error: float
    limit: float
    index: tuple[int, ...]
    """Where the error is largest."""
    expected: float
    got: float
    wrong_elements: int
    elements: int
    where: str
    """Region of the tensor, and the ranks that hold it."""
    hint: str
    """What a mistake of this shape usually is; empty if it is like none of those known."""
    also_wrong: tuple[str, ...]
    right: int
    """Measurements that are within their limits."""

    def lines(self) -> list[str]:
        """For people: what, where, and what it looks like."""
        what = KINDS[self.kind] + ("" if self.kind in ("loss", "grad norm") else " of") + f" {self.name}"
        at = f" at [{', '.join(map(str, self.index))}]" if self.index else ""
        lines = [
            f"first wrong: {what} in {self.dtype}",
            f"expected {self.expected:.9g}, got {self.got:.9g}{at}; error {self.error:.2e}, limit {self.limit:.2e}",
        ]
        lines += [self.where] if self.where else []
        lines += [f"looks like: {self.hint}"] if self.hint else []
        if self.also_wrong:
            shown = ", ".join(self.also_wrong[:_NAMES_SHOWN])
            more = len(self.also_wrong) - _NAMES_SHOWN
            lines.append(f"also wrong: {shown}{f' and {more} more' if more > 0 else ''}; right: {self.right}")
        return lines


def explain(check: Check, answers: Sequence[Answer]) -> Finding | None:
    """The first wrong measurement of a layout; None if all is right."""
    wrong = check.wrong
    if not wrong:
        return None
    first, limit = wrong[0], check.limit_of(wrong[0])
    mask = _wrong_elements(first, limit)
    held = _holders(first, answers)
    index = _worst_index(first)
    return Finding(
        kind=first.kind,
        name=first.name,
        dtype=check.dtype,
        error=first.error,
        limit=limit,
        index=index,
        expected=_item(first.expected, index),
        got=_item(first.got, index),
        wrong_elements=int(mask.sum()),
        elements=mask.numel(),
        where="; ".join(
            filter(
                None,
                [_region(mask, "token" if first.kind in _BY_TOKEN else "row"), _on_ranks(first, mask, held)],
            )
        ),
        hint=_hint(first, mask, held),
        also_wrong=tuple(_family(wrong[1:])),
        right=len(check.measures) - len(wrong),
    )


def _wrong_elements(measure: Measure, limit: float) -> Tensor:
    if measure.got.shape != measure.expected.shape:
        return torch.ones(measure.got.shape, dtype=torch.bool)
    wrong = ~((measure.got - measure.expected).abs() <= limit)  # NaN is wrong
    return wrong if wrong.any() else torch.ones_like(wrong)  # ranks disagree by less than the limit


def _worst_index(measure: Measure) -> tuple[int, ...]:
    if measure.got.shape != measure.expected.shape or not measure.got.numel():
        return ()
    difference = (measure.got - measure.expected).abs().nan_to_num(math.inf, math.inf)
    return tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))


def _item(tensor: Tensor, index: tuple[int, ...]) -> float:
    return float(tensor[index]) if tensor.numel() and len(index) == tensor.dim() else math.nan


def _region(mask: Tensor, first: str) -> str:
    """``3072 of 9632 elements wrong: rows 96-191, all columns``."""
    if mask.dim() == 0 or not mask.numel():
        return ""
    places, words = mask.nonzero(), []
    count = int(mask.sum())
    if count == mask.numel():
        return f"all {count} elements wrong"
    for dim, size in enumerate(mask.shape):
        unit = "column" if dim else first if mask.dim() > 1 or first == "token" else "element"
        used = sorted(set(places[:, dim].tolist()))
        many = "s" if len(used) > 1 else ""
        words.append(f"all {unit}s" if len(used) == size else f"{unit}{many} {_ranges(used)}")
    return f"{count} of {mask.numel()} elements wrong: {', '.join(words)}"


def _ranges(numbers: Sequence[int]) -> str:
    """``0-5, 9, 12-13`` of sorted numbers; a long list is cut."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [f"{a}-{b}" if b > a else f"{a}" for a, b in runs]
    return ", ".join(words[:6]) + (f" and {len(words) - 6} more runs" if len(words) > 6 else "")


def _holders(measure: Measure, answers: Sequence[Answer]) -> list[tuple[Place, Block]]:
    """Which rank holds which part of a tensor."""
    if measure.kind == "token losses":
        number = int(measure.name.split()[-1])
        return [
            (a.place, Block(measure.name, tuple(x.shape), (0,), x))
            for a in answers
            if (x := a.token_losses.get(number)) is not None
        ]
    blocks = _HELD_IN.get(measure.kind)
    if blocks is None:
        return []
    return [(a.place, b) for a in answers for b in getattr(a, blocks) if b.name == measure.name]


def _on_ranks(measure: Measure, mask: Tensor, held: Sequence[tuple[Place, Block]]) -> str:
    """On which ranks a tensor is wrong, in words of the axis that tells them from the others."""
    if measure.got.shape != measure.expected.shape:
        places = {place.rank for place, _ in held}
        return f"the model has no such part of shape {list(measure.got.shape)}: it is on {_ranks(places)}"
    if not held:
        return "no rank holds it" if measure.kind in ("gradient", "update") else ""
    if measure.disagreement:
        return f"{_ranks(measure.disagreement)} hold the same elements with different values"
    missing = measure.got.isnan() & mask
    if missing.any() and not any(block.values.isnan().any() for _, block in held):
        return "no rank holds those elements" if missing.equal(mask) else "no rank holds some of them"
    bad = {place.rank for place, block in held if mask[block.index].any()}
    good = {place.rank for place, _ in held} - bad
    if not good:
        return "wrong on every rank that holds it" if len({place.rank for place, _ in held}) > 1 else ""
    axis = _telling_axis([place for place, _ in held], bad)
    return f"wrong on {axis or _ranks(bad)}, right on {_ranks(good)}"


def _ranks(ranks: Iterable[int]) -> str:
    """``rank 1``, ``ranks 0-2``."""
    every = sorted(set(ranks))
    return f"rank{'s' if len(every) > 1 else ''} {_ranges(every)}"


def _telling_axis(places: Sequence[Place], bad: set[int]) -> str:
    """``tp rank 1`` if exactly the ranks at that place of an axis are wrong."""
    for axis in ("tp", "cp", "pp", "dp"):
        inside = {place.axes[axis][0] for place in places if axis in place.axes and place.rank in bad}
        outside = {place.axes[axis][0] for place in places if axis in place.axes and place.rank not in bad}
        if inside and not inside & outside:
            return f"{axis} rank{'s' if len(inside) > 1 else ''} {_ranges(sorted(inside))}"
    return ""


def _hint(measure: Measure, mask: Tensor, held: Sequence[tuple[Place, Block]]) -> str:
    """The known mistake whose result has this shape, if any."""
    if measure.got.shape != measure.expected.shape:
        return ""
    if measure.disagreement:
        return _parts_of_a_sum(measure, held)
    factor = _constant_factor(measure, mask)
    if factor is None:
        return _permutation(measure, mask)
    if factor == 0:
        return (
            "its gradient never arrives: not computed, or cleared after" if measure.kind == "gradient" else ""
        )
    nearest = round(factor) if factor >= 1 else 1 / round(1 / factor)
    if abs(factor / nearest - 1) > 1e-3:
        return f"a wrong scale: every wrong element is {factor:.6g} times what it should be"
    if factor > 1:
        return f"counted {nearest:.0f} times: a sum over {nearest:.0f} ranks too many, or a missing division"
    return f"1/{1 / nearest:.0f} of what it should be: a missing sum over {1 / nearest:.0f} ranks, or a mean for a sum"


def _constant_factor(measure: Measure, mask: Tensor) -> float | None:
    """got / expected where it is the same for all wrong elements that are not tiny."""
    size = measure.expected.abs()
    use = mask & (size > 1e-3 * size.max()) & ~measure.got.isnan()
    if int(use.sum()) < min(2, measure.expected.numel()):
        return None
    ratios = measure.got[use] / measure.expected[use]
    middle = float(ratios.median())
    return middle if float((ratios - middle).abs().max()) <= 1e-3 * max(abs(middle), 1e-3) else None


def _parts_of_a_sum(measure: Measure, held: Sequence[tuple[Place, Block]]) -> str:
    """Ranks hold different values that sum up to the expected ones."""
    copies = [
        b.values for p, b in held if p.rank in measure.disagreement and b.values.shape == measure.got.shape
    ]
    if measure.kind != "gradient" or len(copies) < 2:
        return ""
    error = float((torch.stack(copies).sum(0) - measure.expected).abs().max())
    if error > 1e-3 * float(measure.expected.abs().max()):
        return ""
    places = [p for p, _ in held if p.rank in measure.disagreement]
    axes = [a for a in ("tp", "cp", "pp", "dp") if len({p.axes.get(a) for p in places}) > 1]
    return f"a missing sum over {' and '.join(axes) or 'ranks'}: the ranks' values add up to what is expected"


def _permutation(measure: Measure, mask: Tensor) -> str:
    """The right rows at wrong places."""
    if measure.expected.dim() == 0 or measure.expected.shape[0] < 2 or measure.got.isnan().any():
        return ""
    rows = mask.reshape(mask.shape[0], -1).any(1)
    expected = measure.expected.reshape(mask.shape[0], -1)
    got = measure.got.reshape(mask.shape[0], -1)[rows]
    scale = float(measure.expected.abs().max())
    distance = (got[:, None] - expected[None]).abs().amax(-1)
    near = distance.amin(1) <= 1e-6 * scale
    interesting = got.abs().amax(1) > 1e-6 * scale
    if int(interesting.sum()) < 2 or not near[interesting].all():
        return ""
    return "right values at wrong places: an order or an offset that ranks do not agree on"


def _family(measures: Sequence[Measure]) -> list[str]:
    """Names of wrong measurements, those of several layers as one: ``layers.*.mlp_norm.weight``."""
    names = [
        re.sub(r"layers\.\d+\.", "layers.*.", m.name) if m.kind == "gradient" else f"{m.kind} of {m.name}"
        for m in measures
    ]
    names = [m.name if m.kind == "gradient" else f"{m.kind} of {m.name}" for m in measures]
    return list(dict.fromkeys(re.sub(r"layers\.\d+\.", "layers.*.", name) for name in names))
