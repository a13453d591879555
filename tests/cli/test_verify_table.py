"""The rows of ``megalite verify``, narrow and wide, of layouts that are equal, wrong, failed and skipped."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from megalite.cli.verify_table import Table, as_json, shorten
from megalite.config import RunConfig
from megalite.models.presets import PRESETS
from megalite.train.verify import Result, Verification
from megalite.train.verify_compare import judge, measure
from megalite.train.verify_explain import explain
from megalite.train.verify_layouts import Layout, all_layouts
from megalite.train.verify_pool import RankError
from tests.helpers.outcomes import HEAD, the_truth, two_ranks

LAYOUTS = {layout.name: layout for layout in all_layouts(8)}
STACK = "Current thread 0x7f (most recent call first):\n" + "\n".join(
    f'  File "f{n}.py", line {n}' for n in range(1, 20)
)
LONG = "tp2-sp-pp2-interleaved_zero_bubble-dp2-zero1"


def result_of(layout: Layout, *, right: bool = True) -> Result:
    truth = the_truth()
    answers = two_ranks(truth)
    if not right:
        next(block for block in answers[1].gradients if block.name == HEAD).values.mul_(2)
    check = judge(measure(answers, truth), "float64", None)
    checks = {"float64": check, "fp32": check} if right else {"float64": check}
    return Result(
        layout, "equal" if right else "wrong", checks=checks, finding=explain(check, answers), seconds=1.5
    )


def results() -> list[Result]:
    hung = "no answer within 60 s, in all_reduce_sum (collectives.py:42)"
    errors = tuple(RankError(rank, "hung", hung, STACK) for rank in range(2))
    reason = "parallel.tp=4 must divide model.num_attention_heads=14: the nearest that do are 2 and 7"
    return [
        result_of(Layout("one process", "own", 1, LAYOUTS["tp2"].parallel)),
        result_of(LAYOUTS["tp2-sp"]),
        result_of(LAYOUTS[LONG]),
        result_of(LAYOUTS["tp2"], right=False),
        Result(LAYOUTS["pp2-zbv"], "failed", "hung", errors=errors),
        Result(LAYOUTS["tp4"], "skipped", reason),
    ]


def printed(width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    table = Table(Console(file=out, width=width), [r.layout for r in results()], ["float64", "fp32"])
    verification = Verification(PRESETS["qwen2.5-0.5b"], list(LAYOUTS.values()), "fp32")
    table.header(
        RunConfig(model=PRESETS["qwen2.5-0.5b"], preset="qwen2.5-0.5b"), verification.small, 8, "cpu"
    )
    for result in results():
        table.row(result)
    table.summary(results(), 41.4)
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_everything_is_said_and_fits(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(width, monkeypatch)
    assert max(len(line) for line in text.splitlines()) <= width
    flat = " ".join(text.split())
    assert "qwen2.5-0.5b: qwen2, rms norm, swiglu, rope, 14 heads over 2 key heads" in flat
    assert f"✓ {LONG}" in flat
    assert "✗ tp2 " in flat
    assert "first wrong: gradient of head.weight in float64" in flat
    assert "12 of 28 elements wrong: rows 4-6, all columns; wrong on tp rank 1, right on rank 0" in flat
    assert "looks like: counted 2 times: a sum over 2 ranks too many, or a missing division" in flat
    assert "ranks 0, 1 hung: no answer within 60 s, in all_reduce_sum (collectives.py:42)" in flat
    assert 'File "f1.py", line 1 ' in flat
    assert "f19.py" not in flat
    assert "– tp4 parallel.tp=4 must divide model.num_attention_heads=14" in flat.replace("  ", " ")
    assert "limits: float64 1e-10, fp32 2 x the error of one process in it, at least 1e-05" in flat
    assert flat.endswith("2 layouts equal one process, 1 wrong, 1 failed, 1 skipped; 41 s")


def test_columns_line_up(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(120, monkeypatch).splitlines()
    head = next(line for line in lines if line.startswith("  layout"))
    rows = [line for line in lines if "5.000000" in line]
    assert len(rows) == 4
    for title, value in (("loss", "5.000000"), ("norm", "2.000000"), ("update", "0")):
        end = head.index(title) + len(title)
        assert all(line[:end].endswith(value) for line in rows), title


def test_nothing_is_printed_for_machines() -> None:
    out = io.StringIO()
    table = Table(Console(file=out), [], ["float64"], quiet=True)
    table.row(results()[3])
    table.summary(results(), 1.0)
    assert out.getvalue() == ""


def test_json_of_every_status() -> None:
    verification = Verification(PRESETS["qwen2.5-0.5b"], list(LAYOUTS.values()), "fp32")
    found = as_json(RunConfig(), verification, results(), 41.4)
    assert found["equal"] is False
    assert found["counts"] == {"equal": 3, "wrong": 1, "failed": 1, "skipped": 1}
    wrong, failed, skipped = found["layouts"][3:]
    assert wrong["first_wrong"]["name"] == HEAD
    assert wrong["first_wrong"]["index"][0] >= 4
    assert wrong["checks"]["float64"]["wrong"] == 1
    assert failed["errors"][0] == {"rank": 0, "kind": "hung", "summary": results()[4].errors[0].summary}
    assert skipped["reason"].startswith("parallel.tp=4")


@pytest.mark.parametrize(
    ("width", "short"), [(40, "layers.11.attention.q_proj.weight"), (20, "11.q_proj"), (8, "….q_proj")]
)
def test_names_are_shortened_from_the_left(width: int, short: str) -> None:
    assert shorten("layers.11.attention.q_proj.weight", width) == short


def test_biases_keep_their_kind() -> None:
    assert shorten("layers.1.attention.v_proj.bias", 14) == "1.v_proj.bias"
    assert shorten("embedding.weight", 20) == "embedding.weight"
