from __future__ import annotations

import pytest
import torch

from megalite.config import ModelConfig, ParallelConfig
from megalite.models.transformer import Transformer
from megalite.parallel.buckets import ALIGNMENT, PADDING
from megalite.parallel.data import FlatBuffers
from megalite.parallel.mesh import Mesh
from megalite.parallel.pieces import iter_pieces
from megalite.parallel.random import initialize
from megalite_kernels.reference.adamw import split

CONFIG = ModelConfig(
    vocab_size=301, num_layers=2, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, qk_norm=True,
    family="qwen3", max_position_embeddings=64,
)  # fmt: skip
SMALL_BUCKETS = ParallelConfig(bucket_size=2000)
CPU = Mesh(device=torch.device("cpu"))


def make(
    dtype: torch.dtype = torch.float32, parallel: ParallelConfig = SMALL_BUCKETS, *, remainders: bool = True
) -> tuple[Transformer, FlatBuffers]:
    model = Transformer(CONFIG)
    initialize(model, 0)
    return model, FlatBuffers(model, CPU, dtype, parallel, remainders=remainders)


def test_layout_is_reversed_aligned_padded_and_complete():
    model, buffers = make()
    order = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    for group in buffers.groups:
        slots = [slot for bucket in group.buckets for slot in bucket.slots]
        numbers = [order[slot.name] for slot in slots]
        assert numbers == sorted(numbers, reverse=True)
        assert len(group.buckets) > 1 or not group.decay
        start = group.weights.data_ptr()
        for bucket in group.buckets:
            assert bucket.weights.data_ptr() == start, "buckets lie end to end"
            start += bucket.weights.nbytes
            assert bucket.weights.numel() % PADDING == 0
            assert all(slot.start % ALIGNMENT == 0 for slot in bucket.slots)
            pairs = zip(bucket.slots, bucket.slots[1:], strict=False)
            assert all(slot.stop <= after.start < SMALL_BUCKETS.bucket_size for slot, after in pairs)
            assert bucket.slots[-1].stop <= bucket.weights.numel()
    assert sorted(slot.name for bucket in buffers.buckets for slot in bucket.slots) == sorted(order)


def test_values_are_kept_and_parameters_are_views():
    reference = Transformer(CONFIG)
    initialize(reference, 0)
    model, buffers = make()
    for (name, parameter), (_, expected) in zip(
        model.named_parameters(), reference.named_parameters(), strict=True
    ):
        assert torch.equal(parameter, expected), name
    for group in buffers.groups:
        group.weights.fill_(2.0)
    assert all((parameter == 2.0).all() for parameter in model.parameters())


def test_decay_follows_the_pieces():
    model, buffers = make()
    decayed = {slot.name for bucket in buffers.buckets if bucket.decay for slot in bucket.slots}
    assert decayed == {name for _, name, piece in iter_pieces(model) if piece.decay}
    assert {name for name, p in model.named_parameters() if p.dim() < 2}.isdisjoint(decayed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_add_up_in_fp32_over_micro_batches(dtype):
    model, buffers = make(dtype)
    tokens = torch.randint(0, 301, (3, 2, 16), generator=torch.Generator().manual_seed(0))
    singles = []
    for batch in tokens:
        buffers.start_step(1)
        model.loss(batch[:, :-1], batch[:, 1:]).backward()
        singles.append([box.tensor.clone() for box in buffers.boxes("main_grad")])
    buffers.start_step(3)
    for batch in tokens:
        model.loss(batch[:, :-1], batch[:, 1:]).backward()
    buffers.finish_gradients()
    for box, *parts in zip(buffers.boxes("main_grad"), *singles, strict=True):
        assert box.tensor.dtype == torch.float32
        assert torch.equal(box.tensor, (parts[0] + parts[1]) + parts[2]), box.piece.name
        assert box.tensor.abs().max() > 0, box.piece.name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("remainders", [True, False])
def test_masters_keep_what_bf16_rounds_away(remainders):
    model, buffers = make(torch.bfloat16, remainders=remainders)
    named = {piece.name: p.detach()[piece.rows[0] : piece.rows[1]] for p, _, piece in iter_pieces(model)}
    reference = Transformer(CONFIG)
    initialize(reference, 0)
    expected = {piece.name: p[piece.rows[0] : piece.rows[1]] for p, _, piece in iter_pieces(reference)}
    for box in buffers.boxes("master"):
        assert torch.equal(box.tensor, expected[box.piece.name])
    assert next(model.parameters()).dtype == torch.bfloat16
    for shard in buffers.optimizer_shards():
        shard.set_values(shard.values.add(1.0))
    buffers.copy_master_to_weights()
    for box in buffers.boxes("master"):
        wanted = expected[box.piece.name] + 1.0
        assert torch.equal(box.tensor, wanted)
        rounded = split(wanted)[0] if remainders else wanted.bfloat16()
        assert torch.equal(named[box.piece.name], rounded)


def test_padding_rows_never_get_a_gradient_or_a_value():
    model, buffers = make()
    tokens = torch.randint(0, 301, (2, 17))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for bucket in buffers.buckets:
        for slot in bucket.slots:
            if slot.name == "head.weight":
                gradient = slot.view(bucket.main_grad)
                assert gradient.shape[0] == 384
                assert (gradient[301:] == 0).all()
                assert gradient[:301].abs().max() > 0
                return
    raise AssertionError("there is no head")
