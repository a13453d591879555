"""``megalite data``: exit codes, one clear line for every failure, kill -9, a full disk, bounded memory."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megalite.cli.main import main
from megalite.data.dataset import PreparedDataset
from tests.data.build import prepared_dataset, random_documents
from tests.data.test_prepare import contents, text
from tests.helpers.source import ROOT

SMALL = ["--vocab-size", "300", "--validation-bytes", "10000", "--workers", "1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "input"
    path.mkdir()
    for i in range(60):
        (path / f"{i:02d}.txt").write_text(text(i))
    return path


def run(*words: object) -> int:
    return main(["data", *map(str, words)])


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "megalite", "data", *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error, which must be the last of stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert sum(line.startswith("megalite: error: ") for line in lines) == 1
    assert lines[-1].startswith("megalite: error: ")
    return lines[-1].removeprefix("megalite: error: ")


def last_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_prepare_inspect_who(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    assert run("prepare", folder, "--output", output, *SMALL, "--json") == 0
    prepared = last_json(capsys)
    assert prepared["output"] == str(output)
    assert prepared["splits"]["train"]["documents"] + prepared["splits"]["validation"]["documents"] == 60
    assert prepared["speed"]["encode_mb_per_s_per_core"] > 0

    assert run("inspect", output) == 0
    shown = capsys.readouterr().out
    assert "bytes per token" in shown
    assert "train: longest document" in shown
    assert "documents by tokens" in shown
    assert run("inspect", output, "--document", "1", "--split", "validation", "--json") == 0
    document = last_json(capsys)
    number = int(Path(document["file"]).stem)
    assert document["text"] == text(number)
    assert document["source"] == "input"
    assert document["byte"] == 0

    assert run("who", output, "--step", "3", "--seq-length", "64", "--global-batch-size", "4", "--json") == 0
    who = last_json(capsys)
    assert [sample["sample"] for sample in who["samples"]] == [8, 9, 10, 11]
    for sample in who["samples"]:
        stream = PreparedDataset(output).reader("train")
        inside = {stream.locate((sample["start"] + i) % stream.tokens) for i in range(64)}
        assert {document["document"] for document in sample["documents"]} == inside


def test_who_reads_a_runs_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With a batch-size ramp, step N's samples follow those of all earlier steps."""
    prepared_dataset(tmp_path / "d", random_documents(50, 40, seed=1))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(
        f"""
        [data]
        seed = 7
        datasets = [{{path = "{tmp_path / "d"}"}}]
        [train]
        seq_length = 32
        micro_batch_size = 2
        global_batch_size = 8
        rampup_start = 2
        rampup_steps = 6
        """
    )
    samples: list[int] = []
    for step in range(1, 9):
        assert run("who", tmp_path / "run", "--step", step, "--json") == 0
        samples += [entry["sample"] for entry in last_json(capsys)["samples"]]
    assert samples == list(range(len(samples)))
    assert run("who", tmp_path / "run" / "config.toml", "--step", "1", "--json") == 0
    assert len(last_json(capsys)["samples"]) == 2
    assert run("who", tmp_path / "run", "--step", "0") == 2
    assert "--step=0 must be at least 1" in error_line(capsys)


def test_usage(capsys: pytest.CaptureFixture[str]):
    assert run() == 2
    assert run("--help") == 0
    assert "prepare" in capsys.readouterr().out
    assert run("mend") == 2
    assert error_line(capsys) == "unknown command 'data mend': use one of prepare, inspect, who"
    assert run("prepare", "--help") == 0
    assert "--validation-bytes" in capsys.readouterr().out


def test_wrong_inputs_are_one_line(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("x")
    (tmp_path / "torn.jsonl").write_text('{"text": "good"}\n{"text": "to')
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff")
    prepared_dataset(tmp_path / "d", [[1, 2, 0]])
    index = tmp_path / "d" / "train.idx"
    index.write_bytes(index.read_bytes()[:40])
    out = tmp_path / "out"
    cases: list[tuple[list[object], int, str]] = [
        (
            ["prepare", folder, "--out", tmp_path / "file" / "o"],
            74,
            "file is a file, so nothing can be written",
        ),
        (
            ["prepare", folder, "--out", out, "--tokenizer", "missing.json"],
            2,
            "tokenizer missing.json does not exist",
        ),
        (["prepare", tmp_path / "nowhere", "--out", out], 2, "nowhere does not exist (built-in corpora:"),
        (["prepare", "--out", out], 2, "no input: name files, folders"),
        (
            ["prepare", tmp_path / "torn.jsonl", "--out", tmp_path / "t"],
            2,
            "torn.jsonl line 2 (byte 17): not JSON",
        ),
        (["prepare", tmp_path / "bad.txt", "--out", tmp_path / "b"], 2, "bad.txt line 2 (byte 5): not UTF-8"),
        (["prepare", folder, "--out", tmp_path / "d"], 2, "d is already a prepared dataset"),
        (["inspect", tmp_path / "nowhere"], 2, "nowhere is not a prepared dataset"),
        (["inspect", tmp_path / "d", "--document", "0"], 2, "train.idx is truncated: it ends at byte 40"),
        (["who", tmp_path / "d", "--step", "1"], 2, "train.idx is truncated: it ends at byte 40"),
    ]
    for words, code, message in cases:
        assert run(*words) == code, words
        assert message in error_line(capsys)


def corpus(path: Path, megabytes: float, seed: int = 1) -> Path:
    """A JSON lines file of distinct documents of about 3 kB."""
    choice = random.Random(seed)
    words = [text(i, words=500) for i in range(50)]
    with open(path, "w") as out:
        while out.tell() < megabytes * 1e6:
            out.write(json.dumps({"text": f"{choice.random()} {choice.choice(words)}"}) + "\n")
    return path


DEADLY = """
import os, signal, sys
from megalite.cli import data_progress

stage, calls = sys.argv[1], int(sys.argv[2])

class Deadly(data_progress.StageProgress):
    left = calls

    def advance(self, amount):
        super().advance(amount)
        self.left -= self._name == stage
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

data_progress.StageProgress = Deadly
from megalite.cli.main import main

sys.exit(main(["data", *sys.argv[3:]]))
"""
"""Runs a command that gets kill -9 at a given report of progress in a given stage."""


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for orphans in /proc")
def test_kill_9_and_the_same_command_again(tmp_path: Path):
    """Killed in every stage: each restart goes on, no worker survives, and the bytes are those of one run."""
    source = corpus(tmp_path / "input.jsonl", 4)
    fixed = ["prepare", source, "--vocab-size", "400", "--workers", "2"]
    subprocess.run(command(*fixed, "--out", tmp_path / "whole"), check=True, env=environment(), timeout=120)
    words = [*fixed, "--out", tmp_path / "out"]
    stages = {"read and hash": 2, "find duplicates": 1, "train the tokenizer": 1, "encode": 3, "assemble": 1}
    for stage, calls in stages.items():
        process = subprocess.Popen(
            [sys.executable, "-c", DEADLY, stage, str(calls), *map(str, words)],
            env=environment(),
            stderr=subprocess.DEVNULL,
        )
        workers: set[int] = set()
        while process.poll() is None:
            workers.update(children(process.pid))
            time.sleep(0.01)
        assert process.returncode == -signal.SIGKILL, stage
        deadline = time.monotonic() + 20
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(map(alive, workers)), f"orphaned workers after {stage}"
    assert len(list((tmp_path / "out.preparing" / "encode").glob("*.json"))) == 4, "finished units were kept"
    subprocess.run(command(*words), check=True, env=environment(), timeout=120)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.preparing").exists()


def test_a_full_disk(tmp_path: Path):
    """Files may not grow beyond a limit (EFBIG for ENOSPC): one line, 74, and it goes on later."""
    source = corpus(tmp_path / "input.jsonl", 3)
    words = ["prepare", source, *SMALL]
    subprocess.run(command(*words, "--out", tmp_path / "whole"), check=True, env=environment(), timeout=120)
    for limit in (2_000, 300_000, 900_000):
        result = subprocess.run(
            command(*words, "--out", tmp_path / "out"),
            env=environment(),
            timeout=120,
            capture_output=True,
            check=False,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),  # noqa: B023
        )
        assert result.returncode == 74, result.stderr
        errors = [line for line in result.stderr.splitlines() if line.startswith("megalite: error: ")]
        assert len(errors) == 1
        assert "File too large" in errors[0]
        assert "run the same command again, what is finished is kept" in errors[0]
        assert not (tmp_path / "out").exists()
    subprocess.run(command(*words, "--out", tmp_path / "out"), check=True, env=environment(), timeout=120)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


MEASURE = """
import resource, sys
from megalite.cli.main import main
code = main(["data", *sys.argv[1:]])
assert "torch" not in sys.modules, "workers would each hold it"
# Not RUSAGE_SELF for itself: its maximum begins with that of the process that started this one (the tests').
own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(f"PEAK {own + 2 * workers}")
sys.exit(code)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_input(tmp_path: Path):
    """150 MB against 15 MB, two workers; a one-token-per-document tokenizer keeps the encoding short."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    peaks = []
    for megabytes in (15, 150):
        source = corpus(tmp_path / f"{megabytes}.jsonl", megabytes)
        words = [
            "prepare",
            source,
            "--out",
            tmp_path / str(megabytes),
            "--tokenizer",
            tmp_path,
            "--workers",
            "2",
        ]
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, *map(str, words)],
            env=environment(),
            timeout=200,
            check=True,
            capture_output=True,
            text=True,
        )
        peaks.append(int(result.stdout.split("PEAK ")[1]) / 1024)
    assert peaks[1] < peaks[0] + 100, f"MiB over all processes: {peaks}"
    assert peaks[1] < 600, f"MiB over all processes: {peaks}"
