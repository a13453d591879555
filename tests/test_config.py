from __future__ import annotations

import ast
import inspect
import itertools

import pytest

import megalite.config
from megalite.cli.config_file import config_from_values, parse_pretrain, write_toml
from megalite.config import DatasetSpec, ModelConfig, RopeScaling, RunConfig, TrainConfig
from megalite.config_values import from_dict, to_dict
from megalite.errors import UserError


def test_dictionaries_round_trip():
    config = RunConfig(
        model=ModelConfig(rope_scaling=RopeScaling(kind="llama3", factor=8.0)),
        train=TrainConfig(steps=7),
    )
    assert from_dict(RunConfig, to_dict(config)) == config


def test_toml_round_trip(tmp_path):
    config = config_from_values({"preset": "llama3.2-1b", "data": {"datasets": [{"path": "x", "weight": 2}]}})
    file = tmp_path / "c.toml"
    file.write_text(write_toml(config))
    again, as_json = parse_pretrain([str(file), "--json"])
    assert again == config
    assert as_json


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"stepz": 3}}, "unknown key 'train.stepz'; did you mean 'steps'?"),
        ({"trainer": {}}, "unknown key 'trainer'; did you mean 'train'?"),
        ({"train": {"steps": "many"}}, "train.steps='many' must be a whole number"),
        ({"train": {"steps": True}}, "train.steps=True must be a whole number"),
        ({"train": {"steps": 0}}, "train.steps=0 must be greater than 0"),
        ({"model": {"norm": "batch"}}, "model.norm='batch' must be one of 'rms', 'layer'"),
        ({"model": {"dropout": 0.1}}, "model.dropout=0.1 is not supported: set it to 0"),
        (
            {"model": {"hidden_size": 30, "num_attention_heads": 4}},
            "must be a multiple of model.num_attention",
        ),
        ({"model": {"num_key_value_heads": 3}}, "must be a multiple of model.num_key_value_heads=3"),
        ({"train": {"seq_length": 9999}}, "train.seq_length=9999 must be at most model.max_position_emb"),
        ({"train": {"micro_batch_size": 3}}, "must be a multiple of train.micro_batch_size=3"),
        ({"optimizer": {"beta2": 1.0}}, "optimizer.beta2=1.0 must be in"),
        ({"optimizer": {"learning_rate": -1.0}}, "optimizer.learning_rate=-1.0 must be greater than 0"),
        ({"schedule": {"min_ratio": 2}}, "schedule.min_ratio=2.0 must be in [0, 1]"),
        ({"data": {"datasets": [{"weight": 1.0}]}}, "data.datasets[0]"),
        ({"data": {"datasets": "x"}}, "data.datasets='x' must be a list"),
        ({"model": 3}, "model=3 must be a table"),
        ({"preset": "gpt5"}, "gpt5"),
    ],
)
def test_wrong_values_name_field_value_and_limit(values, message):
    with pytest.raises(UserError) as caught:
        config_from_values(values)
    assert message in str(caught.value)


def test_command_line_wins_over_file_and_file_over_preset(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('preset = "gpt2-124m"\n[model]\nnum_layers = 3\n[train]\nsteps = 5\nseq_length = 64\n')
    config, _ = parse_pretrain([str(file), "--train.steps", "6", "--dataset", "a", "b=2.5"])
    assert (config.model.num_layers, config.model.hidden_size, config.train.steps) == (3, 768, 6)
    assert config.data.datasets == (DatasetSpec(path="a"), DatasetSpec(path="b", weight=2.5))


def test_short_flags_are_the_long_ones():
    short, _ = parse_pretrain(["--init-from", "hf", "--profile"])
    long, _ = parse_pretrain(["--train.init-from", "hf", "--train.profile"])
    assert short == long
    assert (short.train.init_from, short.train.profile) == ("hf", True)


def test_preset_from_the_command_line():
    config, _ = parse_pretrain(["--preset", "gpt2-124m", "--model.num_layers=2"])
    assert (config.model.family, config.model.num_layers) == ("gpt2", 2)


def test_wrong_arguments_exit_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_pretrain(["--train.stepz", "3"])
    assert caught.value.code == 2
    assert "--train.steps" in capsys.readouterr().err


def test_batch_ramp_is_consistent_with_its_sums():
    train = TrainConfig(
        steps=50,
        micro_batch_size=2,
        global_batch_size=24,
        rampup_start=4,
        rampup_steps=20,
        rampup_increment=4,
    )
    sizes = [train.batch_size_at(step) for step in range(50)]
    assert sizes[0] == 4
    assert sizes[20:] == [24] * 30
    assert sizes == sorted(sizes)
    assert {size % 4 for size in sizes} == {0}
    assert [train.samples_before(step) for step in range(51)] == [sum(sizes[:step]) for step in range(51)]


def test_a_world_that_does_not_divide_the_batch_is_refused_with_a_way_out():
    train = TrainConfig(micro_batch_size=4, global_batch_size=8)
    train.validate_world(2)
    with pytest.raises(UserError, match=r"use multiples of 12, for example train\.global_batch_size=12"):
        train.validate_world(3)


def test_every_setting_has_a_docstring_which_is_its_help():
    undocumented = []
    for node in ast.parse(inspect.getsource(megalite.config)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for before, after in itertools.pairwise([*node.body, ast.Pass()]):
            is_setting = isinstance(before, ast.AnnAssign) and "default_factory" not in ast.unparse(before)
            has_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if is_setting and not has_doc:
                undocumented.append(f"{node.name}.{ast.unparse(before.target)}")
    assert not undocumented
