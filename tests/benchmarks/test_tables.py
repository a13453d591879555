"""README's tables and plots: what the committed records say, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import tables, throughput_plot
from benchmarks.pictures import shown_by
from benchmarks.records import digest, machine_of, read, throughput
from tests.helpers.records import MACHINE, RATES, kernel_records, throughput_record, write
from tests.helpers.source import ROOT

RESULTS = ROOT / "benchmarks" / "results"
MARKERS = (
    "# Title\n\n<!-- benchmarks: throughput -->\nold\n<!-- end -->\n\n<!-- benchmarks: kernels -->\n<!-- end -->\n"
    "<!-- benchmarks: pipeline -->\n<!-- end -->\n<!-- benchmarks: throughput-plot -->\n<!-- end -->\nlast\n"
)


def test_readme_says_what_the_committed_records_say() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(tables.ANY_MARKER.findall(text)) >= 4
    made = tables.render(text, RESULTS, "benchmarks/results")
    assert made == text, "make bench-tables"
    # A number that is changed by hand is caught, in every table.
    sections = list(re.finditer(r"<!-- benchmarks: .*?<!-- end -->", text, re.DOTALL))
    for section in sections:
        for number in list(re.finditer(r"\d[\d,.]*\d", section.group()))[1::15]:
            start, end = (section.start() + place for place in number.span())
            edited = f"{text[:start]}123.4{text[end:]}"
            assert tables.render(edited, RESULTS, "benchmarks/results") == text


def test_committed_plots_show_the_committed_records() -> None:
    assert not tables.stale_plots(RESULTS), "make bench-tables"
    pictures = list(RESULTS.rglob("*.png"))
    assert pictures
    assert all(picture.stat().st_size < 100_000 for picture in pictures)


def test_a_comparison_of_trainers(tmp_path: Path) -> None:
    slow = throughput_record({name: rate / 2 for name, rate in RATES.items()}, clock="process", threads=1)
    write(tmp_path / "throughput.jsonl", [throughput_record({"megalite": 1.0}), throughput_record(), slow])
    made = tables.render(MARKERS, tmp_path, "there")
    assert (
        "| **`megalite`** | 1,208 | 1.13 | 1,695 (1,661 – 1,729) | 73.1 % / 76.7 % | 2.08 | 1.15 | this trainer |"
        in made
    )
    assert (
        "| `hf-llama` | 870 | 0.81 | 2,354 (2,307 – 2,401) | 52.6 % / 55.3 % | 2.90 | 1.97 | another |"
        in made
    )
    assert (
        "`megalite` 604, `plain-llama-compile-bf16w` 536, `plain-llama-compile-autocast` 517 (1.13 of" in made
    )
    assert (
        "transformers 5.23.0; litgpt 0.5.13; left out: `torchtitan` (not installed); commit 0123456789ab; 2026-11-24."
        in made
    )
    assert (
        "`python benchmarks/train_throughput.py --preset llama-60m --precision bf16`: AMD EPYC, 2 cores"
        in made
    )
    assert "every contender on AMD EPYC, avx512_bf16](there/throughput_amd-epyc-avx512-bf16.png)" in made
    assert made.startswith("# Title\n\n<!-- benchmarks: throughput -->\n")
    assert made.endswith("\nlast\n")
    assert "old" not in made
    assert tables.render(made, tmp_path, "there") == made


def test_one_line_for_each_comparison(tmp_path: Path) -> None:
    """Beside the fastest of the others for speed, the one that needs least for memory, whichever it is."""
    record = throughput_record(RATES | {"megalite-less-memory": 1100.0})
    record["contenders"][3] |= {"peak_memory_bytes": 1_600_000_000, "memory_above_state_bytes": 670_000_000}
    record["contenders"][4] |= {"peak_memory_bytes": None, "memory_above_state_bytes": None}
    alone = throughput_record({"megalite": 1.0}, preset="gpt2-124m")
    ahead = throughput_record({"megalite": 604.0, "slow": 15.0}, clock="process", threads=1)
    write(tmp_path / "throughput.jsonl", [ahead, alone, record])
    made = tables.render("<!-- benchmarks: throughput-summary -->\n<!-- end -->", tmp_path, ".")
    first, second = (line.split(" | ", 1)[1] for line in made.splitlines() if line.startswith("| AMD"))
    assert first.startswith("`llama-60m`, bf16 | 1,208 | 1,071 | **1.13** | 73.1 % |")
    assert first.endswith("| 2.08 of 1.60 (1.30) | 1.15 of 0.67 (1.72) | 2026-11-24 |")
    assert second.startswith("`llama-60m`, bf16, CPU time | 604 | 15 | **40** | 36.5 % |")
    assert second.endswith("| 2.08 of 2.90 (0.72) | 1.15 of 1.97 (0.58) | 2026-11-24 |")
    for contender in record["contenders"][1:]:
        contender["peak_memory_bytes"] = None
    write(tmp_path / "throughput.jsonl", [record])
    made = tables.render("<!-- benchmarks: throughput-summary -->\n<!-- end -->", tmp_path, ".")
    assert "| 73.1 % |  | 1.15 of 0.67 (1.72) |" in made


def test_what_makes_a_comparison_weaker_is_said(tmp_path: Path) -> None:
    record = throughput_record(in_turns=False)
    record["contenders"][1] |= {"losses": [10.4, 10.506], "allocator": "glibc"}
    write(tmp_path / "throughput.jsonl", [record])
    made = tables.render(MARKERS, tmp_path, ".")
    assert "losses of the same steps within 2.00 %" in made
    assert "3 rounds of 4 steps, contenders one after the other;" in made
    assert "`plain-llama-compile-bf16w` (glibc) | 1,071" in made


def test_a_gpu_has_both_peaks(tmp_path: Path) -> None:
    card = {
        "device": "NVIDIA H100",
        "table_peak_tflops": 989.0,
        "peak_source": "table of dense bf16 figures",
    }
    write(tmp_path / "throughput.jsonl", [throughput_record(**card), throughput_record(precision="fp32")])
    made = tables.render(MARKERS, tmp_path, ".")
    assert "| MFU causal / full | share of the measured GEMM peak |" in made
    assert "MFU of 989 TFLOP/s (table of dense bf16 figures)" in made
    chosen = "<!-- benchmarks: throughput precision=fp32 -->\n<!-- end -->"
    assert "H100" not in tables.render(chosen, tmp_path, ".")
    with pytest.raises(ValueError, match=r"no record of throughput.jsonl has precision=fp8"):
        tables.render(chosen.replace("fp32", "fp8"), tmp_path, ".")


def test_the_fastest_machine_comes_first(tmp_path: Path) -> None:
    card = {
        "device": "NVIDIA H100",
        "gemm_peak_tflops": 700.0,
        "table_peak_tflops": 989.0,
        "peak_source": "table of dense bf16 figures",
    }
    older, newer = (
        throughput_record(time="2026-11-24T10:00:00"),
        throughput_record(time="2026-11-25T10:00:00"),
    )
    for records, first in (([older, newer | card], newer), ([older | card, newer], older)):
        file = tmp_path / "throughput.jsonl"
        file.unlink(missing_ok=True)
        write(file, records)
        table = tables.render("<!-- benchmarks: throughput -->\n<!-- end -->", tmp_path, ".")
        dates = sorted(("2026-11-24", "2026-11-25"), key=table.index)
        assert dates[0] == first["time"][:10]


def test_one_threads_rate_stands_below_its_own_instruction_set(tmp_path: Path) -> None:
    vectors = MACHINE | {"isa": "avx2"}
    alone = throughput_record(clock="process", threads=1, machine=vectors)
    write(
        tmp_path / "throughput.jsonl",
        [throughput_record(), throughput_record(machine=vectors, peak=0.1), alone],
    )
    made = tables.render("<!-- benchmarks: throughput -->\n<!-- end -->", tmp_path, ".")
    assert made.count("The same by CPU time") == 1
    assert (
        made.index("avx512_bf16, 2 threads")
        < made.index("avx2, 2 threads")
        < made.index("The same by CPU time")
    )


def test_kernels_of_several_machines_are_not_mixed(tmp_path: Path) -> None:
    times = {"megalite": 7.0, "torch": 21.0, "compile": 10.5, "copy": 6.3}
    file = tmp_path / "kernels" / "swiglu.jsonl"
    write(file, kernel_records({**times, "megalite": 100.0}))  # older: replaced by the next
    write(file, [*kernel_records(times), *kernel_records({**times, "torch": 70.0}, threads=1)])
    made = tables.render(MARKERS, tmp_path, ".")
    assert "| `swiglu` | 4096 × 2816 | 3.0, 1.5, 90 % |  |" in made
    assert "| `swiglu` | 4096 × 2816 | 10, 1.5, 90 % |  |" in made
    assert (
        "`python -m benchmarks.kernels.bench_OP --device cpu`: AMD EPYC, 2 cores, avx512_bf16, 1 thread;"
        in made
    )


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(MARKERS)
    arguments = ["--readme", str(readme), "--results", str(tmp_path / "none")]
    assert tables.main([*arguments, "--check"]) == 4
    assert readme.read_text() == MARKERS
    assert tables.main(arguments) == 0
    assert "*none/throughput.jsonl is not there yet: `make bench` writes it.*" in readme.read_text()
    assert "*none/kernels is not there yet: `make bench-kernels` writes it.*" in readme.read_text()
    assert tables.main([*arguments, "--check"]) == 0
    assert "none/pipeline_bubble.jsonl is not there: python benchmarks/pipeline" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- benchmarks: speed -->\n<!-- end -->",
            "no section is named 'speed': there are throughput-summary, throughput, kernels",
        ),
        ("<!-- benchmarks: kernels -->\n", "has no <!-- end --> before the next marker"),
        ("<!-- benchmarks: kernels -->\n" + MARKERS, "has no <!-- end --> before the next marker"),
        ("<!-- benchmarks: kernels dtype -->\n<!-- end -->", "is no marker: write <!-- benchmarks: NAME"),
    ],
)
def test_wrong_markers(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tables.render(text, tmp_path, ".")


def test_the_plot_is_drawn_again_when_its_records_change(tmp_path: Path) -> None:
    runs = [
        throughput_record(),
        throughput_record(precision="fp32", peak=0.7),
        throughput_record(device="H200"),
        throughput_record(machine=MACHINE | {"isa": "avx2"}),
    ]
    write(tmp_path / "throughput.jsonl", runs)
    assert [path.name for path in throughput_plot.pictures(tmp_path)] == [
        "throughput_amd-epyc-avx512-bf16.png",
        "throughput_h200.png",
        "throughput_amd-epyc-avx2.png",
    ]
    (path, draw), *_ = tables.stale_plots(tmp_path).items()
    draw()
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 100_000
    assert shown_by(path) == digest(runs[:2])
    assert path not in tables.stale_plots(tmp_path)
    write(tmp_path / "throughput.jsonl", [throughput_record({"megalite": 1.0})])
    assert path in tables.stale_plots(tmp_path)


def test_one_step_is_in_a_table_and_in_no_plot(tmp_path: Path) -> None:
    """It shows memory; the speeds of an older record stay in the plot."""
    once = {"rounds": 1, "steps_per_round": 1}
    older = throughput_record({"megalite": 600.0, "litgpt": 500.0})
    runs = [older, throughput_record({"megalite": 77.0}, **once), throughput_record(precision="fp32", **once)]
    write(tmp_path / "throughput.jsonl", runs)
    assert list(throughput_plot.pictures(tmp_path).values()) == [[older]]
    text = tables.render("<!-- benchmarks: throughput -->\n<!-- end -->", tmp_path, ".")
    assert "| **`megalite`** | 77 |" in text
    assert "| **`megalite`** | 600 |" not in text


def test_records(tmp_path: Path) -> None:
    write(tmp_path / "throughput.jsonl", [throughput_record(), throughput_record(threads=1)])
    machines = [machine_of(record) for record in throughput(tmp_path)]
    assert [str(machine) for machine in machines] == [
        f"AMD EPYC, 2 cores, avx512_bf16, {n}" for n in ("2 threads", "1 thread")
    ]
    assert machine_of({"device": "NVIDIA H200", "machine": MACHINE}) == machine_of(
        {"device_type": "cuda", "device": "NVIDIA H200"}
    )
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(ValueError, match=r"broken.jsonl:2 is not JSON"):
        read(tmp_path / "broken.jsonl")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"list.jsonl:1 is list, not an object"):
        read(tmp_path / "list.jsonl")
