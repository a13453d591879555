"""Presets have the published shapes."""

from __future__ import annotations

import math

import pytest

from megalite.errors import UserError
from megalite.models.families import hf_tensors, piece_shapes
from megalite.models.presets import PRESETS, preset

# Parameter counts as counted in the published weights (a tied head counts once).
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-350m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_241_732_096,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    assert sum(math.prod(shape) for shape in piece_shapes(preset(name)).values()) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_hold_every_element_once(name):
    config = preset(name)
    tensors = hf_tensors(config)
    assert sum(math.prod(t.shape) for t in tensors) == PUBLISHED[name]
    assert len({t.name for t in tensors}) == len(tensors)


def test_every_published_preset_is_checked_against_its_publication():
    assert set(PRESETS) - set(PUBLISHED) == {"tiny", "llama-60m"}


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown model preset 'llama3-7b': did you mean .*llama3-8b.*\?"):
        preset("llama3-7b")
    with pytest.raises(UserError, match=r"unknown model preset 'zzz': use one of tiny, llama-60m"):
        preset("zzz")
