"""Ranks on the axes, the groups they form, and refusals with the numbers that would do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalite.config import ModelConfig, ParallelConfig
from megalite.errors import UserError
from megalite.parallel.collectives import all_gather, all_reduce_sum
from megalite.parallel.mesh import Axis, mesh_of_group


def places(config: ParallelConfig) -> dict[str, tuple[int, int, list[int]]]:
    """Per axis: size, rank, and the global ranks of its group in order."""
    mesh = mesh_of_group(config, torch.device("cpu"))
    found = {}
    for name in ("tp", "cp", "dp", "pp", "data", "model", "world"):
        axis: Axis = getattr(mesh, name)
        mine = torch.tensor([dist.get_rank()])
        found[name] = (axis.size, axis.rank, all_gather(mine, axis).tolist())
    return found


ALL = list(range(8))


@pytest.mark.parametrize(
    ("degrees", "tp", "cp", "dp", "pp", "data", "model"),
    [
        ({"tp": 2, "cp": 2}, [4, 5], [4, 6], [0, 4], [4], [0, 2, 4, 6], [4, 5]),
        ({"tp": 2, "pp": 2}, [4, 5], [4], [4, 6], [0, 4], [4, 6], [0, 1, 4, 5]),
        ({"cp": 2, "pp": 2}, [4], [4, 5], [4, 6], [0, 4], [4, 5, 6, 7], [0, 4]),
        ({"tp": 4}, [4, 5, 6, 7], [4], [0, 4], [4], [0, 4], [4, 5, 6, 7]),
        ({}, [4], [4], ALL, [4], ALL, [4]),
    ],
)
def test_rank_4_of_8(
    rank_pool: Any,
    degrees: dict[str, int],
    tp: list[int],
    cp: list[int],
    dp: list[int],
    pp: list[int],
    data: list[int],
    model: list[int],
) -> None:
    expected = {"tp": tp, "cp": cp, "dp": dp, "pp": pp, "data": data, "model": model}
    place = rank_pool(8).run(places, ParallelConfig(**degrees))[4]
    assert {name: place[name][2] for name in expected} == expected
    assert all(ranks[rank] == 4 and size == len(ranks) for size, rank, ranks in place.values())
    assert place["world"][2] == ALL


def test_an_axis_of_one_does_nothing() -> None:
    x = torch.ones(3)
    assert all_reduce_sum(x, Axis()) is x
    assert all_gather(x, Axis()) is x
    assert Axis(4, 2).shard(12) == slice(6, 9)


def test_wrong_numbers_name_the_right_ones() -> None:
    config = ParallelConfig(tp=2, pp=3)
    assert config.dp_size(12) == 2
    with pytest.raises(
        UserError, match=r"tp=2 · cp=1 · pp=3 needs a multiple of 6 processes, not 8: start 6 or 12"
    ):
        config.dp_size(8)
    with pytest.raises(UserError, match=r"not 4: start 6$"):
        config.dp_size(4)
    with pytest.raises(UserError, match=r"parallel.tp=0 must be greater than 0"):
        ParallelConfig(tp=0)
    model = ModelConfig(num_attention_heads=12, num_key_value_heads=4, hidden_size=96, ffn_hidden_size=256)
    ParallelConfig(tp=2).validate_model(model)
    with pytest.raises(UserError, match=r"tp=5 must divide model.num_attention_heads=12: .* are 4 and 6"):
        ParallelConfig(tp=5).validate_model(model)
    with pytest.raises(UserError, match=r"tp=6 must divide model.ffn_hidden_size=256: .* are 4 and 8"):
        ParallelConfig(tp=6).validate_model(model)
    with pytest.raises(UserError, match=r"tp=3 must divide model.num_key_value_heads=4 or be a multiple"):
        ParallelConfig(tp=3).validate_model(
            ModelConfig(num_attention_heads=12, num_key_value_heads=4, hidden_size=96, ffn_hidden_size=240)
        )
    with pytest.raises(UserError, match=r"pp=7 · 1 stages each = 7 must be at most model.num_layers=6"):
        ParallelConfig(pp=7).validate_model(model)
