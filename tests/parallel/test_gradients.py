"""Gradient sinks: same gradients as autograd's, once per backward pass, and with a queue nothing but dgrad before W."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite.config import ParallelConfig
from megalite.layers.embedding import VocabParallelEmbedding
from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megalite.models.presets import preset
from megalite.models.transformer import Transformer
from megalite.parallel.data import FlatBuffers
from megalite.parallel.gradients import GradientSink, WeightQueue, add_weight_gradient, get_sink, set_sink
from megalite.parallel.mesh import Mesh, mesh_of_group
from megalite.parallel.partial import sum_partial
from megalite.parallel.pieces import Box
from megalite.parallel.tensor import UNSPLIT, Shard, TensorSplit
from tests.helpers.trace import trace
from tests.parallel.layouts import (
    MODELS,
    Answer,
    assert_equal,
    build,
    gradient_pieces,
    loss_of,
    one_process,
    packed_batch,
    put_together,
)
from tests.parallel.training import assert_layout_equals

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def give_sinks(model: nn.Module, queue: WeightQueue | None = None) -> dict[str, int]:
    """A sink for the weight of every cut layer; counts how often each is told of a gradient."""
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            weight, calls[name] = module.weight, 0

            def added(name: str = name) -> None:
                calls[name] += 1

            wide = torch.promote_types(weight.dtype, torch.float32)
            sink = GradientSink(torch.zeros(weight.shape, dtype=wide), added)
            sink.queue = queue
            set_sink(weight, sink)
    return calls


def take_gradients(model: nn.Module) -> None:
    """Move every sink's gradient to where autograd's is; a weight with a sink has none of autograd's."""
    for parameter in model.parameters():
        if (sink := get_sink(parameter)) is not None:
            assert parameter.grad is None
            parameter.grad = sink.main_grad.to(parameter.dtype)


def sink_job(layout: ParallelConfig, name: str, dtype: torch.dtype, deferred: bool) -> Answer:
    """As `layout_job` for one batch, with sinks; and the trace agrees that a queue puts the products off."""
    mesh = mesh_of_group(layout, torch.device("cpu"))
    sequence = layout.sequence_parallel and mesh.tp.size > 1
    model = build(MODELS[name], TensorSplit(mesh.tp, sequence, layout.tp_chunks), dtype)
    queue = WeightQueue() if deferred else None
    calls = give_sinks(model, queue)
    loss = loss_of(model, packed_batch(), None)
    with trace() as events:
        loss.backward()
    ran = Counter(c.name for c in events.computes)["megalite.linear_weight_grad_"]
    assert ran == (0 if deferred else len(calls)), events
    if queue is not None:
        assert set(calls.values()) == {0}
        queue.take()()
    assert set(calls.values()) == {1}
    take_gradients(model)
    gradients = gradient_pieces(model)
    sum_partial([Box(piece, piece.offset, gradient) for piece, gradient in gradients], mesh.tp)
    return float(loss.detach()), 0.0, gradients


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("layout", [{}, {"tp_chunks": 3}, {"sequence_parallel": False, "tp_chunks": 2}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "one-kv-head"])
def test_sinks_give_the_gradients_of_one_process(
    rank_pool: Any, name: str, layout: dict[str, Any], deferred: bool
) -> None:
    for dtype, tolerance in TOLERANCE.items():
        truth = one_process(MODELS[name], dtype, [packed_batch()])
        truth.norm = 0.0
        answers = rank_pool(2).run(sink_job, ParallelConfig(tp=2, **layout), name, dtype, deferred)
        assert_equal(put_together(answers), truth, tolerance)


@pytest.mark.parametrize(
    "layout", [{"pp_schedule": "zbv"}, {"pp_schedule": "interleaved_zero_bubble", "sequence_parallel": False}]
)
def test_a_pipeline_puts_products_off(rank_pool: Any, layout: dict[str, Any]) -> None:
    """Schedules with a W pass over stages whose layers are cut, with dgrad in uneven chunks."""
    config = dataclasses.replace(MODELS["qwen3-tied"], num_layers=4)
    batches = [packed_batch(seed=seed) for seed in range(4)]
    assert_layout_equals(rank_pool(4).run, ParallelConfig(pp=2, tp=2, tp_chunks=3, **layout), config, batches)


@pytest.mark.parametrize("deferred", [False, True])
def test_sinks_without_ranks(deferred: bool) -> None:
    """The unsplit layers honour sinks too, over several micro-batches."""
    batches = [packed_batch(seed=seed) for seed in range(3)]
    truth = one_process(MODELS["gpt2"], torch.float64, batches)
    model = build(MODELS["gpt2"], UNSPLIT, torch.float64)
    queue = WeightQueue() if deferred else None
    calls = give_sinks(model, queue)
    waiting = []
    for batch in batches:
        loss_of(model, batch, None).backward()
        if queue is not None:
            waiting.append(queue.take())  # one micro-batch's products, run after the others' backward passes
    for compute in waiting:
        compute()
    assert set(calls.values()) == {len(batches)}
    take_gradients(model)
    for piece, gradient in gradient_pieces(model):
        torch.testing.assert_close(gradient, truth.gradients[piece.name], rtol=0, atol=1e-10)


def test_a_bf16_layer_adds_to_an_fp32_gradient() -> None:
    """No bf16 gradient between: two micro-batches whose second is lost if the sum is rounded to bf16."""
    layer = ColumnParallelLinear(1, {"o": Shard.whole(1)}, UNSPLIT, bias=True, std=0.1, dtype=torch.bfloat16)
    give_sinks(layer)
    nn.init.ones_(layer.weight)
    for x in (256.0, 0.5):
        layer(torch.full((1, 1), x, dtype=torch.bfloat16)).sum().backward()
    sink = get_sink(layer.weight)
    assert sink is not None
    assert sink.main_grad.item() == 256.5
    assert layer.bias.grad.item() == 2.0  # biases stay with autograd


def test_without_a_sink_the_product_is_returned() -> None:
    dy, x = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    product = add_weight_gradient(None, dy, x)
    assert isinstance(product, Tensor)
    torch.testing.assert_close(product, torch.einsum("bso,bsi->oi", dy, x))


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_sink_with_a_queue_adds_when_that_is_emptied(in_backward: bool) -> None:
    """In a backward pass no gradients are recorded, and without a queue the product is made at once."""
    told: list[int] = []
    dy, x = torch.randn(3, 4), torch.randn(3, 5)
    for queue in (None, WeightQueue()):
        sink = GradientSink(torch.zeros(4, 5), lambda: told.append(1))
        sink.queue = queue
        with torch.set_grad_enabled(not in_backward):
            sink.add(dy, x)
        if queue is not None:
            assert not sink.main_grad.any()
            assert told == [1]
            queue.take()()
        torch.testing.assert_close(sink.main_grad, dy.t() @ x)
    assert told == [1, 1]


def test_a_queue_frees_the_factors_of_each_product_as_it_goes() -> None:
    queue, order = WeightQueue(), []
    for i in range(3):
        queue.put(lambda i=i: order.append(i))
    first = queue.take()
    queue.put(lambda: order.append("later"))
    first()
    first()  # nothing is left: a product counts once
    assert order == [0, 1, 2]
    queue.take()()
    assert order == [0, 1, 2, "later"]


@pytest.fixture
def dirty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storages that grow are full of NaN, as memory that somebody else had before may be."""
    plain = torch.UntypedStorage.resize_

    def grow(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        plain(storage, size)
        torch.tensor([], dtype=torch.uint8).set_(storage).fill_(255)  # type: ignore[call-overload]
        return storage

    monkeypatch.setattr(torch.UntypedStorage, "resize_", grow)


@pytest.mark.usefixtures("dirty_memory")
@pytest.mark.parametrize("fused_head", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gpt2"])
def test_the_first_gradient_of_a_step_overwrites_what_is_there(name: str, fused_head: bool) -> None:
    """Nothing clears main gradients before a step: whatever they hold, they end as autograd's of two micro-batches."""
    plain = build(MODELS[name], UNSPLIT, torch.float32)
    for _ in range(2):
        (loss_of(plain, packed_batch(), None) * 0.5).backward()
    expected = {piece.name: gradient for piece, gradient in gradient_pieces(plain)}
    model = build(MODELS[name], UNSPLIT, torch.float32)
    state = FlatBuffers(model, Mesh(device=CPU), torch.float32, ParallelConfig(bucket_size=1))
    scale = torch.tensor(0.5)
    for old in (0.0, float("nan"), 1e3):
        for box in state.boxes("main_grad"):
            box.tensor.fill_(old)
        state.start_step(2)
        for _ in range(2):
            (loss_of(model, packed_batch(), None, scale if fused_head else None) * scale).backward()
        state.finish_gradients()
        assert {box.piece.name for box in state.boxes("main_grad")} == set(expected)
        for box in state.boxes("main_grad"):
            torch.testing.assert_close(box.tensor, expected[box.piece.name], msg=box.piece.name)


@pytest.mark.usefixtures("dirty_memory")
def test_a_parameter_without_a_gradient_has_zeros() -> None:
    model = build(MODELS["llama"], UNSPLIT, torch.float32)
    state = FlatBuffers(model, Mesh(device=CPU), torch.float32, ParallelConfig(bucket_size=1))
    for box in state.boxes("main_grad"):
        box.tensor.fill_(7.0)
    state.start_step(0)
    state.finish_gradients()
    assert not any(box.tensor.any() for box in state.boxes("main_grad"))


def with_memory(state: FlatBuffers) -> set[str]:
    """Names of the parameters whose main gradients have memory now."""
    return {slot.name for bucket in state.buckets for slot in bucket.slots if bucket.has_gradients}


@pytest.mark.usefixtures("dirty_memory")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_lend_their_memory_until_they_come(name: str) -> None:
    """From the start of a step on, all but the largest; layer by layer they take it back in the backward pass."""
    model = build(MODELS[name], UNSPLIT, torch.float32)
    state = FlatBuffers(model, Mesh(device=CPU), torch.float32, ParallelConfig(bucket_size=1))
    names = {name for name, _ in model.named_parameters()}
    vocabulary = {name for name in names if "head" in name or "embedding" in name}
    assert with_memory(state) == names
    found: dict[int, set[str]] = {}

    def watch(number: int, output: tuple[Tensor, Tensor]) -> None:
        output[0].register_hook(lambda _: found.update({number: with_memory(state)}))

    for number, layer in enumerate(model.layers.values()):
        layer.register_forward_hook(lambda _layer, _inputs, output, number=number: watch(number, output))
    for _ in range(2):
        found.clear()
        state.start_step(1)
        assert len(with_memory(state)) == 1
        assert with_memory(state) <= vocabulary
        with pytest.raises(RuntimeError, match=r"call finish_gradients\(\)"):
            state.boxes("main_grad")
        loss = loss_of(model, packed_batch(), None, torch.ones(()))
        assert with_memory(state) <= vocabulary, "the head's at most"
        loss.backward()
        for number, there in found.items():
            after = {name for name in names for i in found if i > number and name.startswith(f"layers.{i}.")}
            before = {
                name for name in names for i in found if i <= number and name.startswith(f"layers.{i}.")
            }
            assert after <= there, number
            assert not before & there, number
        assert len(found) == len(model.layers) > 1
        state.finish_gradients()
        assert with_memory(state) == names


@pytest.mark.usefixtures("dirty_memory")
def test_zeros_stand_between_gradients_that_took_their_memory_back() -> None:
    """The optimizer and the norm of a whole bucket read them."""
    model = build(MODELS["gpt2"], UNSPLIT, torch.float32)
    state = FlatBuffers(model, Mesh(device=CPU), torch.float32, ParallelConfig(bucket_size=9000))
    padding = 0
    for _ in range(2):
        state.start_step(0)
        state.finish_gradients()
        for bucket in state.buckets:
            assert not bucket.main_grad.any()
        for bucket in state.lenders:
            padding += bucket.slots[-1].stop - sum(slot.parameter.numel() for slot in bucket.slots)
    assert padding, "between parameters"


@pytest.mark.parametrize("name", ["llama-60m", "gpt2-124m", "qwen3-0.6b", "llama3-8b"])
def test_what_never_lends_is_the_matrix_whose_gradient_comes_first(name: str) -> None:
    """Alone: nothing else of its bucket stays with it."""
    model = preset(name)
    model = dataclasses.replace(model, vocab_size=model.vocab_size or 32000, num_layers=2)
    built = Transformer(model, device="meta")
    state = FlatBuffers(built, Mesh(device=CPU), torch.float32, ParallelConfig())
    lending = {slot.name for bucket in state.lenders for slot in bucket.slots}
    stays = [name for name, _ in built.named_parameters() if name not in lending]
    assert stays == ["embedding.weight" if model.tie_word_embeddings else "head.weight"]


def test_gradients_that_ranks_sum_lend_nothing(rank_pool: Any) -> None:
    """One buffer, one launch of the optimizer for each rule of weight decay."""
    assert rank_pool(2).run(count_shards_of_two_ranks) == [(2, True)] * 2


def count_shards_of_two_ranks() -> tuple[int, bool]:
    """Shards, and whether gradients had memory after the start of a step."""
    layout = ParallelConfig(zero=0, bucket_size=1)
    state = FlatBuffers(
        build(MODELS["llama"], UNSPLIT, torch.float32), mesh_of_group(layout, CPU), torch.float32, layout
    )
    before = with_memory(state)
    state.start_step(1)
    return len(state.optimizer_shards()), with_memory(state) == before


STEPS = ([3, 5, 3], [], [7, 5], list(range(200)))
"""Ids of each step on the first rank."""


def embedding_job() -> list[tuple[list[int], float]]:
    """(rows with a gradient, their sum) after each step, of an embedding with 400 rows; a rank's ids are its own."""
    mesh = mesh_of_group(ParallelConfig(), torch.device("cpu")) if dist.is_initialized() else Mesh(device=CPU)
    embedding = VocabParallelEmbedding(400, 2, padded_rows=400, std=0.1)
    larger = VocabParallelEmbedding(400, 3, padded_rows=400, std=0.1)  # which never lends its memory
    model = nn.ModuleDict({"embedding": embedding, "larger": larger})
    state = FlatBuffers(model, mesh, torch.float32, ParallelConfig(bucket_size=1))
    answers = []
    for ids in STEPS:
        state.start_step(2)
        for half in (ids, ids):
            embedding(torch.tensor(half, dtype=torch.int64) + mesh.rank * 50).sum().backward()
        state.finish_gradients()
        whole = torch.zeros(400, 2)
        for box in state.boxes("main_grad"):
            if box.piece.name.startswith("embedding"):
                whole[box.index] = box.tensor
        answers.append((whole.abs().sum(1).nonzero().flatten().tolist(), float(whole.sum())))
        for box in state.boxes("main_grad"):
            box.tensor.fill_(1.0)  # nobody's business: the next step must not keep it
    return answers


@pytest.mark.usefixtures("dirty_memory")
@pytest.mark.parametrize("world", [1, 2])
def test_an_embedding_has_the_gradients_of_this_step_alone(world: int, rank_pool) -> None:
    """Few ids, none, many; and with other ranks' ids, which nobody here knows."""
    answers = [embedding_job()] if world == 1 else rank_pool(world).run(embedding_job)
    for step, ids in enumerate(STEPS):
        rows = {i + 50 * rank for i in ids for rank in range(world)}
        assert {row for answer in answers for row in answer[step][0]} == rows, step
        assert sum(answer[step][1] for answer in answers) == 4 * len(ids) * world, step
