"""How many bytes a layer keeps for its backward pass, and which layers make what again so that they fit.

For T tokens of a micro-batch on a rank (after context parallelism), e bytes per number, w bytes per statistic
(4, or 8 in float64), n = N / tp query and k = max(1, K / tp) key heads, f = F / tp, and T' = T / tp with sequence
parallelism (else T), a layer keeps

    stream     2 · (T' · H · e + s · T' · w)    what each norm reads; s = 1 statistic for RMSNorm, 2 for LayerNorm
    normed     2 · T' · H · e                    outputs of the norms, inputs of the projections ("norm")
    projected  T · (n + 2k) · D · e              queries, keys and values in one tensor, as the projection gives them
    placed     T · (n + k) · D · e               queries and keys after head norms or, with ring attention, rotation
                                                 ("attention"); elsewhere attention turns them itself: nothing
    attended   T · n · (D · e + w)               attention's output and log-sum-exp
    inner      T · 2f · e, or T · f · e          what the activation reads; one f without a gate
    active     T · f · e                         what it gives, input of down_proj ("activation")

Head norms keep one statistic per head more. Ulysses keeps the exchanged queries, keys, values and output in place of
`placed` (none of them made again) and `projected` only where head norms need it. With "mlp" go half of `normed`,
`inner`, `active`, and one norm's statistics. A fully recomputed layer keeps half of `stream`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megalite.config import ModelConfig, ParallelConfig, RecomputeConfig
from megalite.errors import UserError
from megalite.layers.recompute import FULL, KEEP, Recompute

GB = 1e9


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of one micro-batch."""

    tokens: int
    """T: of the micro-batch, divided by cp."""
    itemsize: int = 2
    """e: bytes of one number."""
    tp: int = 1
    sequence: bool = False
    """Sequence parallelism: the residual stream is divided over tp."""
    ulysses: bool = False
    """Context parallelism by exchanging heads."""
    ring: bool = False
    """Context parallelism by passing keys and values on."""

    @classmethod
    def of(cls, parallel: ParallelConfig, tokens: int, itemsize: int = 2) -> Share:
        """The part of a rank of this layout, of a micro-batch of `tokens` tokens."""
        sequence = parallel.sequence_parallel and parallel.tp > 1
        ulysses = parallel.cp > 1 and parallel.cp_method == "ulysses"
        ring = parallel.cp > 1 and not ulysses
        return cls(tokens // parallel.cp, itemsize, parallel.tp, sequence, ulysses, ring)

    @property
    def stream_tokens(self) -> int:
        """T': tokens of the residual stream on this rank."""
        return self.tokens // self.tp if self.sequence else self.tokens

    @property
    def wide(self) -> int:
        """w: bytes of one statistic."""
        return max(4, self.itemsize)


class LayerBytes(NamedTuple):
    """What a layer keeps, by kind; see the module's docstring."""

    stream: int
    normed: int
    projected: int
    placed: int
    attended: int
    inner: int
    active: int


def layer_bytes(model: ModelConfig, share: Share) -> LayerBytes:
    """What one layer keeps of one micro-batch when nothing is made again."""
    tokens, stream, e, w = share.tokens, share.stream_tokens, share.itemsize, share.wide
    hidden, head = model.hidden_size, model.size_per_head
    statistics = 1 if model.norm == "rms" else 2
    queries, keys = model.num_attention_heads // share.tp, max(1, model.kv_heads // share.tp)
    inner = model.ffn_hidden_size // share.tp
    projected = tokens * (queries + 2 * keys) * head * e
    turned = tokens * (queries + keys) * head * e
    placed = turned if model.qk_norm or (share.ring and model.position == "rope") else 0
    attended = tokens * queries * (head * e + w)
    if share.ulysses:
        attended += projected + tokens * queries * head * e  # the output before and after the exchange
        placed, projected = 0, projected if model.qk_norm else 0
    if model.qk_norm:
        attended += tokens * (queries + keys) * w
        if model.position != "rope":  # the head norm alone keeps packed copies of what it reads
            attended += turned
    return LayerBytes(
        stream=2 * stream * (hidden * e + statistics * w),
        normed=2 * stream * hidden * e,
        projected=projected,
        placed=placed,
        attended=attended,
        inner=tokens * inner * e * (2 if model.gated else 1),
        active=tokens * inner * e,
    )


def kept_bytes(model: ModelConfig, share: Share, choice: Recompute = KEEP) -> int:
    """Bytes that one layer keeps of one micro-batch between its forward and its backward pass.

    Without weights and without what all layers share (angle tables, document bounds).
    """
    kept = layer_bytes(model, share)
    if choice.full:
        return kept.stream // 2
    dropped = choice.norm * kept.normed + choice.attention * kept.placed + choice.activation * kept.active
    if choice.mlp:
        statistics = kept.stream // 2 - kept.normed // 2
        dropped += statistics + kept.inner + (not choice.norm) * kept.normed // 2
        dropped += (not choice.activation) * kept.active
    return sum(kept) - dropped


def recompute_plan(
    model: ModelConfig,
    config: RecomputeConfig,
    share: Share,
    layers: int,
    kept: Callable[[Sequence[Recompute]], float] | None = None,
    cheap: Recompute = KEEP,
) -> tuple[Recompute, ...]:
    """What each of a rank's layers makes again.

    With kind="budget", as little as fits: first the parts, those that free most bytes per operation first, then
    the MLPs, then whole layers; each is added to one layer after the other until the kept bytes fit.

    Args:
        model: its shape.
        config: what the user asks for.
        share: this rank's part of a micro-batch.
        layers: number of the rank's layers, of all its stages.
        kept: bytes that the rank keeps with these choices, when it keeps most; None: its layers' for one micro-batch.
        cheap: what costs next to nothing to make again, for kind="auto".

    Returns:
        One choice for each layer of the rank, in order.

    Raises:
        UserError: the budget is too small even if all layers are recomputed in full.
    """
    if config.kind in ("auto", "none"):
        return (cheap if config.kind == "auto" else KEEP,) * layers
    if config.kind == "full":
        return (FULL,) * layers
    if config.kind == "selective":
        return (Recompute(**dict.fromkeys(config.parts, True)),) * layers
    budget = config.budget_gb * GB
    kept = kept or (lambda choices: sum(kept_bytes(model, share, choice) for choice in choices))
    plans = plans_by_cost(model, share, layers)
    found = bisect_left(plans, True, key=lambda plan: kept(plan) <= budget)
    if found == len(plans):
        raise UserError(
            f"recompute.budget_gb={config.budget_gb:g} is less than the {kept(plans[-1]) / GB:.3g} GB of activations "
            f"that a rank with {layers} layers keeps even with recompute.kind='full': raise it, lower "
            "train.micro_batch_size, divide the activations by parallel.tp, cp or pp, or take a pp_schedule that "
            "keeps fewer micro-batches"
        )
    return plans[found]


def plans_by_cost(model: ModelConfig, share: Share, layers: int) -> list[tuple[Recompute, ...]]:
    """From nothing to everything made again, one thing in one layer more at a time, the cheapest first."""
    choice = KEEP
    plans = [(choice,) * layers]
    for part in (*parts_by_worth(model, share), "mlp", "full"):
        choice = FULL if part == "full" else replace(choice, **{part: True})
        plans += [(choice,) * done + plans[-1][done:] for done in range(1, layers + 1)]
    return plans


def parts_by_worth(model: ModelConfig, share: Share) -> list[str]:
    """The passes over memory that free anything, the one that frees most bytes per floating-point operation first."""
    kept = layer_bytes(model, share)
    freed = {"norm": kept.normed, "activation": kept.active, "attention": kept.placed}
    # Operations per number made again: three for a rotation, to which a head norm adds its four; swiglu has an exp,
    # the approximate gelu a tanh of a polynomial. All numbers have e bytes, so the fewest operations free the most.
    operations = {
        "norm": 4 if model.norm == "rms" else 7,
        "activation": {"swiglu": 6, "geglu": 13, "gelu_tanh": 12, "relu2": 2}[model.activation],
        "attention": (3 if model.position == "rope" else 0) + (4 if model.qk_norm else 0),
    }
    return sorted((part for part, size in freed.items() if size), key=operations.__getitem__)
