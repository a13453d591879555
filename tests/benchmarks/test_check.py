"""The guard against slower code: made-up records in which something is slower, faster, noisy or of another machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import check
from benchmarks.check import BenchmarkFailed, main
from benchmarks.records import Machine, Record
from benchmarks.targets import Target
from tests.helpers.records import RATES, kernel_records, throughput_record, write

HERE = Machine("AMD EPYC", 2, "avx512_bf16", 2)
TIMES = {"megalite": 7.0, "torch": 21.0, "compile": 10.5, "copy": 6.3}
BEST = "plain-llama-compile-bf16w"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """What is committed."""
    write(tmp_path / "throughput.jsonl", [throughput_record()])
    write(tmp_path / "kernels" / "swiglu.jsonl", kernel_records(TIMES))
    return tmp_path


def measuring(*runs: Sequence[Record]) -> tuple[Callable[[Target], Sequence[Record]], list[Target]]:
    """A measurement that gives these records in turn, and the targets that it was called with."""
    left, asked = list(runs), []

    def measure(target: Target) -> Sequence[Record]:
        asked.append(target)
        return left.pop(0)

    return measure, asked


def trained(ours: float, peer: float = RATES[BEST], **fields: Any) -> list[Record]:
    """A comparison of ours with the strongest other trainer."""
    return [throughput_record({"megalite": ours, BEST: peer}, **fields)]


def run(results: Path, *runs: Sequence[Record], only: str, options: Sequence[str] = ()) -> int:
    arguments = ["--results", str(results), "--json", *options]
    arguments += ["--ops", ""] if only == "throughput" else ["--throughput", "", "--ops", "swiglu"]
    return main(arguments, measuring(*runs)[0], HERE)


def last(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("ours", "peer", "peak", "code"),
    [
        (1208, 1071, 0.438, 0),
        (1100, 1071, 0.438, 0),  # 9 % slower: within the floor of 10 %
        (1208 / 3, 1071 / 3, 0.438 / 3, 0),  # a machine that is busy throughout
        (2000, 1071, 0.438, 0),  # faster
        (1070, 1071, 0.438, 4),
        (1208, 1250, 0.438, 4),  # the other one got faster: we are behind where we were ahead
        (1208, 1071, 0.6, 4),  # a faster product that we don't use
    ],
)
def test_training_is_compared_by_ratios(
    results: Path, ours: float, peer: float, peak: float, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    now = trained(ours, peer, peak=peak)
    assert run(results, now, now, only="throughput") == code
    found = last(capsys)
    assert found["compared"] == 3
    assert bool(found["slower"]) == (code == 4)


def test_a_slower_measurement_is_repeated_once(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(results, trained(900), trained(1200), only="throughput") == 0
    assert run(results, trained(900), trained(950), only="throughput") == 4
    out = capsys.readouterr().out
    assert "something seems slower; measuring once more" in out
    assert "✗ llama-60m bf16: tokens/s / best peer" in out
    assert "2 of 3 ratios are below their limit" in out
    worst = max(json.loads(out.splitlines()[-1])["slower"], key=lambda c: c["now"])
    assert worst["now"] == pytest.approx(950 / 1071)  # the better of the two
    assert worst["limit"] == pytest.approx(0.9 * 1208 / 1071)


def test_more_memory_than_recorded_is_caught(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = trained(1208)
    now[0]["contenders"][0]["memory_above_state_bytes"] *= 1.2
    assert run(results, now, now, only="throughput") == 4
    assert [c["metric"] for c in last(capsys)["slower"]] == [
        "llama-60m bf16: memory above state, best peer / ours"
    ]


def test_only_the_strongest_peers_run_again(results: Path) -> None:
    measure, asked = measuring(trained(1208))
    assert main(["--results", str(results), "--ops", "", "--peers", "2"], measure, HERE) == 0
    assert " ".join(asked[0].command) == (
        "benchmarks/train_throughput.py --preset llama-60m --precision bf16 --seq-length 512 --micro-batch-size 4 "
        "--global-batch-size 4 --threads 2 --clock wall --rounds 2 "
        f"--contenders megalite {BEST} plain-llama-compile-autocast"
    )


def test_a_single_step_is_nothing_to_compare_with(tmp_path: Path) -> None:
    """A peer's may take minutes: it was recorded for its memory."""
    write(tmp_path / "throughput.jsonl", [throughput_record(rounds=1, steps_per_round=1)])
    measure, asked = measuring(trained(1208))
    assert main(["--results", str(tmp_path), "--ops", ""], measure, HERE) == 0
    assert not asked


def test_the_recorded_spread_widens_the_limit(tmp_path: Path) -> None:
    for spread, code in ((0.02, 4), (0.18, 0), (3.0, 4)):  # by 30 % at most
        folder = tmp_path / str(spread)
        write(folder / "throughput.jsonl", [throughput_record(spread=spread)])
        rate = 1000 if spread < 1 else 800
        assert run(folder, trained(rate), trained(rate), only="throughput") == code


@pytest.mark.parametrize(
    ("now", "code"),
    [
        ({}, 0),
        ({name: 2 * time for name, time in TIMES.items()}, 0),  # a machine that is busy throughout
        ({"megalite": 5.0}, 0),
        ({"megalite": 8.0}, 4),
        ({"torch": 17.0}, 0),  # one baseline by a fifth: noise
        (
            {"torch": 17.0, "compile": 8.5, "copy": 5.1},
            4,
        ),  # all of them: ours did not get as fast as they did
        ({"megalite": 8.0, "compile": 8.5, "torch": 24.0}, 4),
    ],
)
def test_kernels_are_compared_by_ratios(
    results: Path, now: dict[str, float], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = kernel_records({**TIMES, **now})
    assert run(results, fresh, fresh, only="kernels") == code
    found = last(capsys)
    assert found["compared"] == 1
    assert len(found["slower"]) == (code == 4)


def test_an_op_bound_by_products_is_held_to_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"of_copy": 0.01, "of_gemm": 0.9}
    write(tmp_path / "kernels" / "swiglu.jsonl", kernel_records(TIMES, **fields))
    fresh = kernel_records(TIMES, **{**fields, "of_gemm": 0.6})
    assert run(tmp_path, fresh, fresh, only="kernels") == 4
    (slower,) = last(capsys)["slower"]
    assert slower["metric"] == "swiglu: swiglu T4096 F2816 bf16, torch, compile, product / ours"
    assert slower["committed"] == pytest.approx((3 * 1.5 * 0.9 / 0.97) ** (1 / 3))


@pytest.mark.parametrize(
    "here",
    [
        Machine("Intel Xeon", 2, "avx512_bf16", 2),
        Machine("AMD EPYC", 2, "avx2", 2),
        Machine("AMD EPYC", 2, "avx512_bf16", 1),
        Machine("NVIDIA H100"),
    ],
)
def test_another_kind_of_machine_is_not_compared(
    results: Path, here: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, asked = measuring()
    assert main(["--results", str(results)], measure, here) == 0
    assert main(["--results", str(results), "--require"], measure, here) == 2
    assert not asked  # nothing is measured in vain
    out = capsys.readouterr().out
    assert f"not recorded for {here}, so not compared: " in out
    assert f"no committed result of {here} to compare with: make bench" in out


def test_what_turns_out_to_be_other_work_is_not_compared(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(results, trained(1.0, seq_length=256), only="throughput") == 0
    out = capsys.readouterr().out
    assert "llama-60m bf16: nothing in common with the record" in out
    assert "no committed result of AMD EPYC, 2 cores, avx512_bf16, 2 threads" in out


def test_other_versions_are_said(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(results, trained(1208, versions={"torch": "2.14.0"}), only="throughput") == 0
    assert "recorded with torch 2.13.0+cpu, here 2.14.0" in capsys.readouterr().out


def test_a_benchmark_that_fails_is_no_pass(
    results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target("broken", [], ["-c", "print('why'); raise SystemExit(3)"], "", lambda a, b: {})
    with pytest.raises(BenchmarkFailed, match=r"broken ended with exit code 3:\nwhy"):
        check.run(target)
    monkeypatch.setattr(check, "LIMIT_S", 0.01)
    with pytest.raises(BenchmarkFailed, match=r"broken took more than 0.01 s"):
        check.run(target)
    assert main(["--results", str(results), "--ops", ""], check.run, HERE) == 1
    assert "error: llama-60m bf16 took more than" in capsys.readouterr().err


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ops", "softmax"], here=HERE) == 2
    assert "op 'softmax' has no benchmark: use some of adamw, attention" in capsys.readouterr().err
    (tmp_path / "throughput.jsonl").write_text("{")
    assert main(["--results", str(tmp_path)], here=HERE) == 2
    assert "throughput.jsonl:1 is not JSON" in capsys.readouterr().err


def test_the_defaults_are_benchmarks_with_such_cases() -> None:
    committed = check.kernel_targets(check.RESULTS, check.HOT, "bf16", 1.0, check.this_machine())
    assert set(check.HOT) <= set(check.benchmarks())
    for target in committed:
        assert any(record["case"] == check.HOT[target.name] for record in target.committed)
