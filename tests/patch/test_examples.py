"""The examples run, and say what is true."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--steps", "2", "--hidden", "128", "--layers", "1", "--batch", "2", "--length", "64"]


@pytest.mark.parametrize(
    ("name", "replaced"),
    [
        ("huggingface_llama", 3 + 1 + 1 + 1 + 1),  # norms, rope, attention, swiglu, loss
        ("nanogpt_style", 3 + 1 + 1 + 1),  # norms, attention, gelu, loss
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_example_runs(name, replaced, dtype, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    # How many projections are worth replacing depends on the CPU.
    monkeypatch.setattr("megalite_kernels.patching.linear.LEAST_WEIGHT", 1 << 40)
    figures = importlib.import_module(name).main([*SMALL, "--device", "cpu", "--dtype", dtype])
    assert figures["replaced"] == replaced
    assert figures["restored"]
    assert figures["largest difference"] < (1e-4 if dtype == "float32" else 0.1)
    assert figures["before loss"] < 10.5  # under log(16384) = 9.7 plus what random weights add: it is a loss
    printed = capsys.readouterr().out
    assert "linear_cross_entropy" in printed
    assert "tokens/s" in printed
