"""Recomputation: the same bits, exactly the bytes that the formula says, and no work done twice without need."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from megalite.config import ModelConfig, ParallelConfig, RecomputeConfig
from megalite.errors import UserError
from megalite.layers.attention import Context
from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megalite.layers.recompute import FULL, KEEP, Recompute
from megalite.layers.recompute_plan import (
    Share,
    kept_bytes,
    layer_bytes,
    parts_by_worth,
    plans_by_cost,
    recompute_plan,
)
from megalite.layers.rope import rope_frequencies, rope_tables
from megalite.models.transformer import build_block
from megalite.parallel.context import ContextSplit
from megalite.parallel.gradients import GradientSink, get_sink, set_sink
from megalite.parallel.mesh import Mesh, mesh_of_group
from megalite.parallel.tensor import TensorSplit, own_tokens
from tests.helpers.kept import Watch
from tests.parallel.layouts import MODELS

PARTS = Recompute(norm=True, activation=True, attention=True)
MLP = dataclasses.replace(PARTS, mlp=True)
CHOICES = {
    "norm": Recompute(norm=True),
    "activation": Recompute(activation=True),
    "attention": Recompute(attention=True),
    "parts": PARTS,
    "mlp": Recompute(mlp=True),
    "parts and mlp": MLP,
    "full": FULL,
}
LEARNED_WITH_HEAD_NORMS = dataclasses.replace(MODELS["qwen3-tied"], position="learned")
TOKENS, LAYERS = 32, 2
BOUNDS = (0, 5, 6, 19, TOKENS)


@dataclasses.dataclass
class Seen:
    """One forward and backward pass of some layers."""

    kept: int
    gradients: list[Tensor]
    forward: dict[str, int]
    backward: dict[str, int]


def run_layers(
    config: ModelConfig,
    choice: Recompute,
    parallel: ParallelConfig | None = None,
    dtype: torch.dtype = torch.float32,
    sinks: bool = False,
) -> Seen:
    """Two layers on this rank's part of a packed batch, with weights from a seed; `sinks` add gradients up."""
    device = torch.device("cpu")
    mesh = mesh_of_group(parallel, device) if parallel else Mesh(device=device)
    split = TensorSplit(mesh.tp, parallel is not None and parallel.sequence_parallel and mesh.tp.size > 1)
    sequence = ContextSplit(mesh.cp, parallel.cp_method, BOUNDS) if parallel and mesh.cp.size > 1 else None
    torch.manual_seed(mesh.tp.rank)
    layers = nn.ModuleList(build_block(config, i, split, dtype=dtype) for i in range(LAYERS))
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.2)
    if sinks:
        add_sinks(layers)
    torch.manual_seed(7)
    whole, positions = torch.randn(TOKENS, config.hidden_size, dtype=dtype), torch.arange(TOKENS)
    if sequence is not None:
        whole, positions = sequence.own_tokens(whole), sequence.own_tokens(positions)
    rotary = None
    if config.position == "rope":
        rotary = rope_tables(positions, rope_frequencies(config.size_per_head, 1e4), dtype)
    bounds = None if sequence is not None else torch.tensor(BOUNDS, dtype=torch.int32)
    context = Context(rotary, bounds, 13, sequence, split)
    forward, backward = Watch(), Watch()
    with forward:
        start = own_tokens(whole, split).clone().requires_grad_()
        x, residual = start, None
        for layer in layers:
            x, residual = layer(x, residual, context, None, choice)
    # What the last layer hands on is its reader's, but for a total that its own norm keeps.
    kept = forward.alive_at_rest(x, residual) if choice.full or choice.mlp else forward.alive_at_rest(x)
    with backward:
        ((x + residual) * torch.arange(1, 1 + x.shape[-1], dtype=dtype)).sum().backward()
    gradients = [start.grad, *map(gradient_of, layers.parameters())]
    return Seen(kept, gradients, forward.collectives(), backward.collectives())


def add_sinks(layers: nn.Module) -> None:
    """As in a trainer on CPUs: products hand their inputs over, and activations write in place."""
    for layer in layers.modules():
        if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
            wide = torch.promote_types(layer.weight.dtype, torch.float32)
            total = torch.zeros(layer.weight.shape, dtype=wide)
            set_sink(layer.weight, GradientSink(total, added=lambda: None))


def gradient_of(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad if (sink := get_sink(parameter)) is None else sink.main_grad
    assert gradient is not None
    return gradient


def more(seen: Seen, than: Seen) -> dict[str, int]:
    """Collectives that a backward pass has on top of another's."""
    return {
        name: n - than.backward.get(name, 0)
        for name, n in seen.backward.items()
        if n != than.backward.get(name)
    }


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", MODELS)
def test_same_bits_and_the_stated_bytes(name: str, choice: str) -> None:
    config, share = MODELS[name], Share(TOKENS, 4)
    kept, dropped = run_layers(config, KEEP), run_layers(config, CHOICES[choice])
    assert all(torch.equal(a, b) for a, b in zip(kept.gradients, dropped.gradients, strict=True))
    assert kept.kept == LAYERS * kept_bytes(config, share)
    assert dropped.kept == LAYERS * kept_bytes(config, share, CHOICES[choice])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    share = Share(TOKENS, dtype.itemsize)
    kept = run_layers(MODELS["qwen3-tied"], KEEP, dtype=dtype)
    for choice in (KEEP, PARTS, MLP, FULL):
        seen = run_layers(MODELS["qwen3-tied"], choice, dtype=dtype)
        assert seen.kept == LAYERS * kept_bytes(MODELS["qwen3-tied"], share, choice)
        assert all(torch.equal(a, b) for a, b in zip(kept.gradients, seen.gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_where_backward_passes_bring_what_was_dropped(name: str, dtype: torch.dtype) -> None:
    share = Share(TOKENS, dtype.itemsize)
    kept = run_layers(MODELS[name], KEEP, dtype=dtype, sinks=True)
    assert all(gradient.abs().max() > 0 for gradient in kept.gradients)
    for choice in CHOICES.values():
        seen = run_layers(MODELS[name], choice, dtype=dtype, sinks=True)
        assert seen.kept == LAYERS * kept_bytes(MODELS[name], share, choice), choice
        assert all(torch.equal(a, b) for a, b in zip(kept.gradients, seen.gradients, strict=True)), choice


@pytest.mark.parametrize(
    ("choice", "there"), [(KEEP, True), (PARTS, True), (MLP, False), (FULL, False)], ids=str
)
def test_the_widest_tensor_is_gone_while_the_last_product_runs(choice: Recompute, there: bool) -> None:
    block = build_block(MODELS["gpt2"], 0, TensorSplit())
    add_sinks(block)
    made, seen = [], []
    block.mlp.first.register_forward_hook(
        lambda layer, given, out: made.append(StorageWeakRef(out.untyped_storage()))
    )
    block.mlp.down_proj.register_forward_pre_hook(lambda layer, given: seen.append(not made[-1].expired()))
    context = Context(None, torch.tensor(BOUNDS, dtype=torch.int32), 13)
    block(torch.randn(TOKENS, 32, requires_grad=True), None, context, None, choice)
    assert seen == [there]


def test_head_norms_without_rotation() -> None:
    share = Share(TOKENS, 4)
    kept = run_layers(LEARNED_WITH_HEAD_NORMS, KEEP)
    seen = run_layers(LEARNED_WITH_HEAD_NORMS, Recompute(attention=True))
    assert kept.kept == LAYERS * kept_bytes(LEARNED_WITH_HEAD_NORMS, share)
    assert (
        seen.kept
        == LAYERS * kept_bytes(LEARNED_WITH_HEAD_NORMS, share, Recompute(attention=True))
        < kept.kept
    )
    assert all(torch.equal(a, b) for a, b in zip(kept.gradients, seen.gradients, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_more_recomputation_keeps_less(name: str) -> None:
    choices = (KEEP, Recompute(norm=True), PARTS, MLP, FULL)
    kept = [run_layers(MODELS[name], choice).kept for choice in choices]
    assert kept == sorted(set(kept), reverse=True)


def all_choices(config: ModelConfig, parallel: ParallelConfig) -> list[Seen]:
    return [run_layers(config, choice, parallel) for choice in (KEEP, PARTS, MLP, FULL)]


LAYOUTS = {
    "tp": ParallelConfig(tp=2, sequence_parallel=False),
    "tp+sp": ParallelConfig(tp=2),
    "ring": ParallelConfig(cp=2),
    "ulysses": ParallelConfig(cp=2, cp_method="ulysses"),
}


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gpt2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_over_ranks(rank_pool: Any, layout: str, name: str) -> None:
    config, parallel = MODELS[name], LAYOUTS[layout]
    share = Share.of(parallel, TOKENS, 4)
    for seen in rank_pool(2).run(all_choices, config, parallel):
        for one, choice in zip(seen, (KEEP, PARTS, MLP, FULL), strict=True):
            assert one.kept == LAYERS * kept_bytes(config, share, choice), choice
            assert all(torch.equal(a, b) for a, b in zip(seen[0].gradients, one.gradients, strict=True))
        nothing, parts, mlp, full = seen
        assert not more(parts, nothing)
        gathers = {"c10d::_allgather_base_": LAYERS} if layout == "tp+sp" else {}
        assert more(mlp, nothing) == gathers
        again = {"_allgather_base_": 2, "_reduce_scatter_base_": 1} if layout == "tp+sp" else {}
        again |= {"allreduce_": 1} if layout == "tp" else {}
        again |= {"alltoall_base_": 4} if layout == "ulysses" else {}
        again |= {"send": 1, "recv_": 1} if layout == "ring" else {}
        assert more(full, nothing) == {f"c10d::{op}": LAYERS * times for op, times in again.items()}


@pytest.mark.parametrize("choice", CHOICES)
def test_compiles_whole(choice: str) -> None:
    config = MODELS["qwen3-tied"]  # its head norms stand between projection and attention
    torch.manual_seed(0)
    block = build_block(config, 0, TensorSplit())
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    rotary = rope_tables(torch.arange(TOKENS), rope_frequencies(8, 1e4), torch.float32)
    context = Context(rotary, torch.tensor(BOUNDS, dtype=torch.int32), 13)
    inputs = [torch.randn(TOKENS, 32, requires_grad=True) for _ in range(2)]
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results, kept = [], []
    for function, recompute in ((block, KEEP), (compiled, KEEP), (compiled, CHOICES[choice])):
        x, residual = function(*inputs, context, None, recompute)
        if function is compiled:
            kept.append(saved(x, block, context))
        wanted = [*inputs, *block.parameters()]
        results.append(torch.autograd.grad((x * x).sum() + residual.sum(), wanted))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert kept[1] < kept[0]


def saved(x: Tensor, block: nn.Module, context: Context) -> int:
    """Bytes that a compiled block's node keeps, without weights and what it was given for all layers."""
    assert x.grad_fn is not None
    assert context.rotary is not None
    known = {t.untyped_storage()._cdata for t in (*block.parameters(), *context.rotary)}
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in x.grad_fn.saved_tensors}
    return sum(size for key, size in storages.items() if key not in known)


def test_two_backward_passes_through_one_graph() -> None:
    """Pieces made again are handed out once per pass; a second pass makes them anew."""
    config = MODELS["llama"]
    block = build_block(config, 0, TensorSplit())
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    rotary = rope_tables(torch.arange(TOKENS), rope_frequencies(8, 1e4), torch.float32)
    x = torch.randn(TOKENS, 32, requires_grad=True)
    out, _ = block(x, None, Context(rotary, torch.tensor(BOUNDS, dtype=torch.int32), 13), None, PARTS)
    first = torch.autograd.grad(out.sum(), [x, *block.parameters()], retain_graph=True)
    second = torch.autograd.grad(out.sum(), [x, *block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_is_prepared_without_gradients() -> None:
    block = build_block(MODELS["gpt2"], 0, TensorSplit())
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, context = torch.randn(1, 8, 32), Context()
    with torch.no_grad():
        kept = block(x, None, context)
        for choice in CHOICES.values():
            assert all(
                torch.equal(a, b) for a, b in zip(kept, block(x, None, context, None, choice), strict=True)
            )


LLAMA = dataclasses.replace(MODELS["llama"], num_layers=4)
SHARE = Share(TOKENS, ring=True)  # where queries and keys are kept after the rotation


def bytes_of(plan: Sequence[Recompute]) -> int:
    return sum(kept_bytes(LLAMA, SHARE, choice) for choice in plan)


def planned(budget: float, **options: Any) -> list[Recompute]:
    config = RecomputeConfig(kind="budget", budget_gb=budget / 1e9)
    return list(recompute_plan(LLAMA, config, SHARE, 4, **options))


def test_budget_recomputes_as_little_as_fits() -> None:
    one_part = Recompute(**{parts_by_worth(LLAMA, SHARE)[0]: True})
    for plan in (
        [KEEP] * 4,
        [one_part, KEEP, KEEP, KEEP],
        [one_part] * 4,
        [PARTS] * 4,
        [MLP, PARTS, PARTS, PARTS],
        [MLP] * 4,
        [FULL, MLP, MLP, MLP],
        [FULL] * 4,
    ):
        assert planned(bytes_of(plan) + 0.5) == plan
    assert planned(bytes_of([KEEP] * 4) - 1) == [one_part, KEEP, KEEP, KEEP]


def test_budget_is_for_what_the_caller_says_is_kept() -> None:
    """Three micro-batches in flight, and something that no layer keeps."""
    assert planned(3 * bytes_of([PARTS] * 4) + 7.5, kept=lambda plan: 3 * bytes_of(plan) + 7) == [PARTS] * 4
    assert planned(3 * bytes_of([PARTS] * 4) + 6.5, kept=lambda plan: 3 * bytes_of(plan) + 7)[0] == MLP


def test_budget_orders_parts_by_bytes_per_operation() -> None:
    assert parts_by_worth(LLAMA, SHARE) == ["attention", "norm", "activation"]
    assert parts_by_worth(LLAMA, Share(TOKENS)) == ["norm", "activation"]
    assert parts_by_worth(MODELS["gpt2"], SHARE) == ["norm", "activation"]


def test_plans_from_cheap_to_dear_keep_less_and_less() -> None:
    sizes = [bytes_of(plan) for plan in plans_by_cost(LLAMA, SHARE, 4)]
    assert len(sizes) == 1 + 5 * 4
    assert sizes == sorted(set(sizes), reverse=True)


def test_budget_that_cannot_be_met() -> None:
    with pytest.raises(UserError, match=r"budget_gb=\S+ is less than the \S+ GB of .* recompute.kind='full'"):
        planned(bytes_of([FULL] * 4) / 2)


def test_plans_of_the_other_kinds() -> None:
    assert recompute_plan(LLAMA, RecomputeConfig(), SHARE, 4) == (KEEP,) * 4
    assert recompute_plan(LLAMA, RecomputeConfig(kind="full"), SHARE, 2) == (FULL,) * 2
    chosen = recompute_plan(LLAMA, RecomputeConfig(kind="selective", parts=("norm",)), SHARE, 4)
    assert chosen == (Recompute(norm=True),) * 4


def test_layout_divides_what_is_kept() -> None:
    alone, tp = layer_bytes(LLAMA, Share(64)), layer_bytes(LLAMA, Share(64, tp=2))
    both = layer_bytes(LLAMA, Share.of(ParallelConfig(tp=2), 64))
    assert (tp.stream, both.stream) == (alone.stream, alone.stream // 2)
    assert tp.active == alone.active // 2 == both.active
    assert layer_bytes(LLAMA, Share.of(ParallelConfig(cp=2), 64)) == layer_bytes(LLAMA, Share(32, ring=True))
