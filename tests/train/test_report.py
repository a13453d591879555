"""The page: complete, self-contained, safe with foreign text, and made from any state of a run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megalite.cli.report import main
from megalite.errors import UserError
from megalite.train.report import make_report, write_report
from tests.helpers.fake_run import Kind, write_fake_run
from tests.helpers.tiny import make_dataset


class Page(HTMLParser):
    """Collects text, ids and references, and checks that tags close in order."""

    VOID = frozenset({"meta", "br", "link", "img", "path", "use", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._note(attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._note(attrs)

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href"):
                self.references.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag, f"</{tag}> out of order"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("good", 1200),
        ("overfitting", 300),
        ("diverging", 300),
        ("short", 8),
        ("no_evals", 50),
        ("good", 1),
        ("good", 2),
    ],
)
def test_any_run_gives_one_self_contained_page(kind: Kind, steps: int, tmp_path: Path):
    source = write_report(write_fake_run(tmp_path / "run", kind, steps=steps)).read_text()
    page = Page(source)
    assert "Is pre-training helping?" in page.text
    assert page.tags.count("svg") >= 7
    assert len(page.ids) == len(set(page.ids)), "two charts share an id"
    assert set(page.references) <= {f"#{name}" for name in page.ids}, "a reference leaves the page"
    outside = re.findall(r"https?://[^\s\"'<)]+|url\((?!#)|@import|<script", source)
    assert set(outside) <= {"http://www.w3.org/2000/svg"}
    assert "nan" not in re.findall(r"[\w.]+", page.text.lower().replace("nanoseconds", ""))
    assert "var(--" in source
    assert "$" not in page.text


def test_key_numbers_are_on_the_page(tmp_path: Path):
    folder = write_fake_run(tmp_path / "run", "good", steps=400)
    page = Page(write_report(folder).read_text())
    last = json.loads((folder / "evals.jsonl").read_text().splitlines()[-1])
    assert f"{last['val_bits_per_byte']:.3f}" in page.text
    for shown in ("2.020", "2.410", "2.120", "2.950", "1.64M", "5.9M", "0.26 passes", "860 GFLOP/s", "bf16"):
        assert shown in page.text, shown
    for section in ("How it went", "Samples through training", "How utilisation is counted", "Timeline"):
        assert section in page.text, section
    assert 'preset = "tiny"' in page.text
    assert "checkpoint" in page.text
    assert "resume" in page.text


def test_text_from_outside_stays_text(tmp_path: Path):
    folder = write_fake_run(tmp_path / "run", "good", steps=40)
    attack = '<script>alert(1)</script> $hero ${answer} & "quotes" \ud7ff'
    run = json.loads((folder / "run.json").read_text())
    run |= {"name": attack, "command": attack}
    run["data"]["paths"] = [attack]
    run["machine"]["cpu"] = attack
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "config.toml").write_text(attack)
    samples = [{"prompt": attack, "text": attack * 100, "tokens": [1], "new_tokens": 1}]
    sources = {attack: {"bits_per_byte": 1.0}, "b": {"bits_per_byte": 2.0}}
    record = {"step": 40, "tokens": 4e4, "val_loss": 3.0, "val_bits_per_byte": 1.5, "samples": samples}
    (folder / "evals.jsonl").write_text(json.dumps({**record, "sources": sources}) + "\n")
    event = {"step": 3, "kind": attack, "time": 1.7e9, "parameter": attack}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    source = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in source
    assert attack in Page(source).text


def test_math_marks_in_a_source_name_are_not_typeset(tmp_path: Path):
    folder = write_fake_run(tmp_path / "run", "good", steps=40)
    sources = {"$\\frac$": {"bits_per_byte": 1.0}, "維基 a_$b": {"bits_per_byte": 2.0}}
    record = {"step": 40, "tokens": 4e4, "val_loss": 3.0, "val_bits_per_byte": 1.5, "sources": sources}
    (folder / "evals.jsonl").write_text(json.dumps(record) + "\n")
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "$\\frac$" in text
    assert "維基 a_$b" in text


def test_spikes_and_skipped_steps_are_marked_and_counted(tmp_path: Path):
    page = Page(write_report(write_fake_run(tmp_path / "run", "good", steps=90)).read_text())
    assert "spikes (2)" in page.text
    page = Page(write_report(write_fake_run(tmp_path / "bad", "diverging", steps=200)).read_text())
    assert "skipped steps (14)" in page.text
    assert "layers.3.mlp.down_proj.weight" in page.text


def test_a_run_with_only_its_facts(tmp_path: Path):
    folder = write_fake_run(tmp_path / "run", "good", steps=1)
    for name in (
        "metrics.jsonl",
        "evals.jsonl",
        "events.jsonl",
        "baselines.json",
        "overlap.json",
        "config.toml",
    ):
        (folder / name).unlink()
    page = Page(write_report(folder).read_text())
    assert "Unknown" in page.text
    assert "metrics.jsonl is missing." in page.text


def test_a_torn_line_is_said(tmp_path: Path):
    folder = write_fake_run(tmp_path / "run", "good", steps=20)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    assert "metrics.jsonl: 1 line was unreadable" in Page(write_report(folder).read_text()).text


def test_many_events_are_shortened(tmp_path: Path):
    folder = write_fake_run(tmp_path / "run", "good", steps=20)
    events = [{"step": i, "kind": "checkpoint", "time": 1.7e9 + i} for i in range(1000)]
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, events)) + "\n")
    text = Page(write_report(folder).read_text()).text
    assert "940 more" in text
    assert "step 999" in text


def test_samples_are_compared_with_the_data_at_hand(tmp_path: Path):
    data = make_dataset(tmp_path / "data")
    folder = write_fake_run(tmp_path / "run", "good", steps=40)
    (folder / "overlap.json").unlink()
    run = json.loads((folder / "run.json").read_text())
    run["data"] = {"paths": [str(data)], "train_tokens": 1000}
    (folder / "run.json").write_text(json.dumps(run))
    report = make_report(folder)
    kept = json.loads((folder / "overlap.json").read_text())
    assert kept["step"] == 40
    assert kept["sample_tokens"] == 48
    assert kept["natural_longest_shared"] > 0
    assert {s.name: s.verdict for s in report.verdict.signals}["longest copied run"] != "unknown"
    stamp = (folder / "overlap.json").stat().st_mtime_ns
    write_report(folder)
    assert (folder / "overlap.json").stat().st_mtime_ns == stamp, "analysed again for nothing"


def test_data_that_is_gone_is_said(tmp_path: Path):
    folder = write_fake_run(tmp_path / "run", "good", steps=40)
    (folder / "overlap.json").unlink()
    text = Page(write_report(folder).read_text()).text
    assert "Samples were not compared with the training text" in text


@pytest.mark.parametrize(
    ("name", "message"), [("absent", "does not exist"), ("empty", "is not a run directory")]
)
def test_no_run_there(name: str, message: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        write_report(tmp_path / name)


def test_a_failed_write_keeps_the_old_report(tmp_path: Path):
    folder = write_fake_run(tmp_path / "run", "good", steps=20)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        write_report(folder, tmp_path / "file" / "report.html")


def test_missing_matplotlib_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_fake_run(tmp_path / "run", "good", steps=20)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="need matplotlib: pip install matplotlib"):
        write_report(folder)


def test_importing_the_report_does_not_import_matplotlib_or_torch():
    code = (
        "import sys, megalite.train.report; print([m for m in ('matplotlib', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_fake_run(tmp_path / "run", "overfitting", steps=300)
    out = tmp_path / "page.html"
    assert main([str(folder), "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out.splitlines()[-1])
    assert summary["report"] == str(out)
    assert out.exists()
    assert not (folder / "report.html").exists()
    assert summary["answer"] == "no"
    assert {"name", "value", "verdict", "reason"} == set(summary["signals"][0])
    assert "overfits" in printed.err
