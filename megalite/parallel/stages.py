"""Which layers each pipeline stage holds: contiguous ranges whose largest cost is as small as it can be.

The cost of a layer is its training FLOPs per token; the embedding counts with the first stage, the output head
and its loss with the last. Tensor and context parallelism divide every one of these by the same number, so the
balance does not depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from megalite.config import ModelConfig, ParallelConfig
from megalite.config_parallel import V_SHAPED
from megalite.errors import UserError

EMBEDDING_FLOPS_PER_ELEMENT = 1400
"""What the embedding's look-up and its gradient cost per token and element, as FLOPs. They move about 14 bytes
(bf16 row read and written, its gradient read, an fp32 sum read and written) and multiply nothing; a byte takes the
time of about 20 FLOPs on two CPU cores and of 295 on an H100. At H=512 that is 3 % of a layer, at H=4096 0.4 %."""


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Training FLOPs per token (forward and backward, attention counted causally), in whole numbers."""

    layers: tuple[int, ...]
    embedding: int
    head: int
    attention: tuple[int, ...] = ()
    """The part of each layer that is scores and values: it has no weights."""

    def of(self, layers: range, *, first: bool, last: bool) -> int:
        """Cost of a stage that holds some layers, and the embedding or the head if it is the first or the last."""
        own = sum(self.layers[layers.start : layers.stop])
        return own + first * self.embedding + last * self.head


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Layers of every stage, and where the stages are.

    Stage s is on rank s % pp ("loop"); in a V, rank r holds stages r and 2 · pp - 1 - r.
    """

    layers: tuple[range, ...]
    """Layers of each stage, in the model's order, none left out."""
    pp: int = 1
    v_shaped: bool = False

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return len(self.layers)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Stages on pipeline rank `rank`, in the model's order.

        Raises:
            ValueError: there is no such rank.
        """
        if not 0 <= rank < self.pp:
            raise ValueError(f"rank {rank} is none of the {self.pp} pipeline ranks 0 to {self.pp - 1}")
        return tuple(stage for stage in range(self.num_stages) if self.rank_of(stage) == rank)

    def rank_of(self, stage: int) -> int:
        """Pipeline rank that holds stage `stage`.

        Raises:
            ValueError: there is no such stage.
        """
        if not 0 <= stage < self.num_stages:
            raise ValueError(
                f"stage {stage} is none of the {self.num_stages} stages 0 to {self.num_stages - 1}"
            )
        if self.v_shaped and stage >= self.pp:
            return 2 * self.pp - 1 - stage
        return stage % self.pp

    def costs(self, costs: StageCosts) -> tuple[int, ...]:
        """Cost of every stage."""
        last = self.num_stages - 1
        return tuple(costs.of(part, first=i == 0, last=i == last) for i, part in enumerate(self.layers))


def plan_stages(model: ModelConfig, parallel: ParallelConfig, seq_length: int) -> StagePlan:
    """Balance the layers of a model over the stages of a pipeline.

    Of all ways to cut the layers into contiguous ranges of at least one layer: one whose largest stage costs
    least; among those, the most even (least sum of squares); among those, the one whose earlier stages are
    shorter, since earlier stages keep the activations of more micro-batches.

    Args:
        model: its shape; `vocab_size` must be set.
        parallel: pp, the schedule and the stages per rank.
        seq_length: tokens per sample (S), for the attention's share.

    Raises:
        UserError: more stages than layers, or the vocabulary's size is not known.
    """
    stages = parallel.num_stages
    if stages > model.num_layers:
        parallel.validate_model(model)  # says it with the numbers
    v_shaped = parallel.pp > 1 and parallel.pp_schedule in V_SHAPED
    return StagePlan(balance(stage_costs(model, seq_length), stages), parallel.pp, v_shaped)


def stage_costs(model: ModelConfig, seq_length: int) -> StageCosts:
    """Costs of a model's parts at sequence length `seq_length`; layers and head sum to `flops_per_token(...).causal`.

    Raises:
        UserError: the vocabulary's size is not known.
    """
    if model.vocab_size <= 0:
        raise UserError(
            f"model.vocab_size={model.vocab_size} must be known to weigh the output head against the layers: set it"
        )
    hidden, ffn, head = model.hidden_size, model.ffn_hidden_size, model.size_per_head
    queries, keys = model.num_attention_heads * head, model.kv_heads * head
    products = hidden * (2 * queries + 2 * keys) + hidden * ffn * (3 if model.gated else 2)
    windows = [model.window_of_layer(i) or seq_length for i in range(model.num_layers)]
    attention = tuple(6 * min(seq_length, window) * queries for window in windows)
    layers = tuple(6 * products + scores for scores in attention)
    embedding = EMBEDDING_FLOPS_PER_ELEMENT * hidden
    return StageCosts(layers, embedding, 6 * hidden * model.vocab_size, attention)


def balance(costs: StageCosts, stages: int) -> tuple[range, ...]:
    """Contiguous ranges of layers for `stages` stages, at least one layer each, as `plan_stages` says.

    Two passes: a bisection finds the smallest limit that no stage need exceed, then a dynamic programme over
    (stage, first layer) finds the most even cut within it. Whole numbers throughout, so ties are exact.

    Raises:
        ValueError: there are fewer layers than stages, or no stage.
    """
    count = len(costs.layers)
    if not 1 <= stages <= count:
        raise ValueError(f"{count} layers cannot be cut into {stages} stages of at least one layer each")
    limit = _smallest_limit(costs, stages)
    sums = [0, *accumulate(costs.layers)]
    # best[start] = (sum of squares, length of the first range) of the layers from `start`, for the stages so far
    # looked at, the last stage first.
    best: dict[int, tuple[int, int]] = {count: (0, 0)}
    lengths: list[dict[int, tuple[int, int]]] = []
    for stage in reversed(range(stages)):
        extra = (stage == 0) * costs.embedding + (stage == stages - 1) * costs.head
        found: dict[int, tuple[int, int]] = {}
        for start in range(stage, stage + count - stages + 1):
            for stop in range(start + 1, count + 1):
                cost = sums[stop] - sums[start] + extra
                if cost > limit:
                    break
                if stop in best:
                    choice = (cost * cost + best[stop][0], stop - start)
                    found[start] = min(found.get(start, choice), choice)
        best = found
        lengths.append(found)
    ranges, start = [], 0
    for found in reversed(lengths):
        stop = start + found[start][1]
        ranges.append(range(start, stop))
        start = stop
    return tuple(ranges)


def _smallest_limit(costs: StageCosts, stages: int) -> int:
    """Least cost that some cut's largest stage has."""
    low, high = 0, sum(costs.layers) + costs.embedding + costs.head
    while low < high:
        middle = (low + high) // 2
        if _fits(costs, stages, middle):
            high = middle
        else:
            low = middle + 1
    return low


def _fits(costs: StageCosts, stages: int, limit: int) -> bool:
    """Whether some cut has no stage over the limit.

    Stages filled from the front as far as the limit allows need the fewest stages; cutting one of them again
    makes none larger, so fewer stages than asked for are as good.
    """
    needed, load, last = 1, costs.embedding, len(costs.layers) - 1
    for i, cost in enumerate(costs.layers):
        tail = costs.head if i == last else 0
        if load + cost + tail > limit and i > 0:
            needed, load = needed + 1, 0
        load += cost
        if load + tail > limit:
            return False
    return needed <= stages
