"""Everything a user can get wrong gives one clear line, a documented exit code, and loses nothing.

Most of it in this process, as the console script calls it: a process of its own costs seconds for torch. Those that
prove what only a process has (its exit code, its limits, its ranks) start one.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from megalite.cli.main import main
from tests.helpers.ranks import ranks
from tests.helpers.runs import ROOT, command, environment, run, write_config
from tests.helpers.tiny import cheap_surroundings, make_dataset, read_losses, tiny_values


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


def error_line(stderr: str) -> str:
    """The command's single line of complaint; a traceback is a failure."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("megalite: error: ")]
    assert len(lines) == 1, stderr
    return lines[0]


def pretrain(tmp_path: Path, values: dict) -> int:
    with cheap_surroundings():
        return main(["pretrain", str(write_config(tmp_path / "c.toml", values))])


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def change_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(
        text.replace('"add_prefix_space": false', '"add_prefix_space": true')
    )


def shorten_bin(folder: Path) -> None:
    data = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(data[:-10])


def break_idx(folder: Path) -> None:
    data = (folder / "train.idx").read_bytes()
    (folder / "train.idx").write_bytes(b"X" + data[1:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_tokenizer, "tokenizer.json does not exist"),
        (change_tokenizer, "tokenizer.json has fingerprint"),
        (shorten_bin, "train.bin"),
        (break_idx, "train.idx"),
        (shutil.rmtree, "is not a prepared dataset"),
    ],
)
def test_damaged_data_is_named(damage, message, dataset, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    damage(copy)
    assert pretrain(tmp_path, tiny_values(copy, tmp_path / "run")) == 2
    assert message in error_line(capsys.readouterr().err)


def test_a_misspelt_key_names_the_nearest(dataset, tmp_path):
    values = tiny_values(dataset, tmp_path / "run")
    values["optimizer"]["learning_rat"] = 1.0
    done = run("pretrain", str(write_config(tmp_path / "c.toml", values)))
    assert done.returncode == 2
    assert "unknown key 'optimizer.learning_rat'; did you mean 'learning_rate'?" in error_line(done.stderr)
    assert not (tmp_path / "run").exists()


def test_an_impossible_world_names_the_limit(dataset, tmp_path):
    values = tiny_values(dataset, tmp_path / "run", train={"micro_batch_size": 8})
    config = write_config(tmp_path / "c.toml", values)
    with ranks(command("pretrain", str(config)), 2, tmp_path) as started:
        codes = [process.wait(timeout=100) for process in started.processes]
        said = started.said(0) + started.said(1)
    assert 2 in codes, said
    assert set(codes) <= {2, 69}, said  # the first to fail may end the other
    assert "8 samples a step cannot be divided over dp=2 processes" in said


@pytest.mark.parametrize("name", ["absent.toml", "broken.toml"])
def test_a_configuration_that_cannot_be_read(name, tmp_path, capsys):
    (tmp_path / "broken.toml").write_text("[train\nsteps = 3")
    assert main(["pretrain", str(tmp_path / name)]) == 2
    message = "does not exist" if name == "absent.toml" else "not valid TOML"
    assert message in error_line(capsys.readouterr().err)


def test_a_run_directory_below_a_file(dataset, tmp_path, capsys):
    (tmp_path / "file").write_text("keep me")
    assert pretrain(tmp_path, tiny_values(dataset, tmp_path / "file" / "run")) == 74
    assert "file" in error_line(capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == "keep me"


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(dataset, tmp_path):
    """Files may not grow beyond a limit that the first save fits and a later, larger one does not."""
    small = tiny_values(dataset, tmp_path / "run", train={"steps": 4})
    assert pretrain(tmp_path, small) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run/checkpoints").rglob("*") if p.is_file()}
    largest = max(len(data) for data in before.values())

    longer = write_config(tmp_path / "c.toml", tiny_values(dataset, tmp_path / "run", train={"steps": 12}))
    done = subprocess.run(
        command("pretrain", str(longer)),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2)),
    )
    assert done.returncode == 74
    assert "checkpoints" in error_line(done.stderr)
    assert {p: p.read_bytes() for p in before} == before
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    with cheap_surroundings():
        assert main(["pretrain", str(longer)]) == 0
    assert sorted(read_losses(tmp_path / "run")) == list(range(1, 13))


def test_unknown_commands_and_help(capsys):
    done = run("pretrian")
    assert done.returncode == 2
    assert "unknown command 'pretrian'" in error_line(done.stderr)
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("pretrain", "data", "exit codes", "75"):
        assert word in shown
    assert main(["pretrain", "--help"]) == 0
