"""From files to a dataset folder, restartable and all or nothing.

Everything is first made in ``OUTPUT.preparing`` beside the output, one finished unit of work after the other;
the last act renames the complete folder. Killed at any moment, the same command goes on where it stopped, and
the outcome is the same bytes. The work folder needs about as much space as the dataset itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megalite.data.dataset import INFO_FILE
from megalite.data.indexed import fsync_folder
from megalite.data.stages import Preparation, PrepareOptions, Progress
from megalite.data.tokenize import Tokenizer
from megalite.errors import StorageError, UserError

PUBLISHING = "publishing"
"""Marker in the work folder: the dataset is complete and is being given its name."""


def prepare(options: PrepareOptions, progress: Progress) -> dict[str, Any]:
    """Prepare a dataset folder and return what its dataset.json holds.

    Raises:
        UserError: bad arguments or input; the output exists; another process is preparing it.
        StorageError: a worker process died.
        OSError: the disk is full or cannot be written.
    """
    output = Path(options.output)
    if not output.name:
        raise UserError(f"--output {output} has no name: give a folder to make")
    work = output.with_name(output.name + ".preparing")
    if (info := _finish_publishing(work, output)) and info["arguments"] == options.that_matter():
        return info
    _check_output(output, options.overwrite)
    tokenizer = _given_tokenizer(options)
    _make_folder(output.parent)
    with _locked(work, options.restart):
        try:
            info = Preparation(options, work, progress, tokenizer).all_stages()
        except OSError as error:
            if error.filename is not None:  # says itself what could not be opened
                raise
            raise StorageError(
                f"{error.strerror or error} while preparing into {work}: mend that and run the same command "
                "again, what is finished is kept"
            ) from None
        _publish(work, output)
    return info


def _make_folder(folder: Path) -> None:
    for ancestor in (folder, *folder.parents):
        if ancestor.exists() and not ancestor.is_dir():
            raise StorageError(
                f"{ancestor} is a file, so nothing can be written below it: choose another --output"
            )
    folder.mkdir(parents=True, exist_ok=True)


def _given_tokenizer(options: PrepareOptions) -> Tokenizer | None:
    if not options.tokenizer:
        return None
    return Tokenizer.load(options.tokenizer, eod_token=options.eod_token, add_eod=True)


def _check_output(output: Path, overwrite: bool) -> None:
    finished = (output / INFO_FILE).exists()
    if finished and not overwrite:
        raise UserError(f"{output} is already a prepared dataset: choose another --output, or --overwrite it")
    if not finished and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not a prepared dataset: choose another --output")


@contextmanager
def _locked(work: Path, restart: bool) -> Iterator[None]:
    """The work folder, held against a second process; `restart` empties it first."""
    work.mkdir(exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing into {work}: wait for it or stop it") from None
        if restart:
            for entry in work.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != "lock":
                    entry.unlink()
        yield


def _publish(work: Path, output: Path) -> None:
    """Give the complete folder its name; a dataset being replaced is removed only after that."""
    (work / PUBLISHING).touch()
    old = _old(output)
    if old.exists():
        shutil.rmtree(old)
    if output.exists():
        os.rename(output, old)
    os.rename(work / "dataset", output)
    fsync_folder(output.parent)
    _clean_up(work, output)


def _finish_publishing(work: Path, output: Path) -> dict[str, Any] | None:
    """Complete what a run that was killed while publishing began; its dataset.json, if there was one."""
    if not (work / PUBLISHING).exists():
        return None
    if (work / "dataset").exists():
        _publish(work, output)
    else:
        _clean_up(work, output)
    info: dict[str, Any] = json.loads((output / INFO_FILE).read_text(encoding="utf-8"))
    return info


def _clean_up(work: Path, output: Path) -> None:
    """Remove what is not needed any more; the marker last, so that a kill in here is taken up again."""
    if _old(output).exists():
        shutil.rmtree(_old(output))
    for entry in work.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != PUBLISHING:
            entry.unlink()
    (work / PUBLISHING).unlink()
    work.rmdir()


def _old(output: Path) -> Path:
    return output.with_name(output.name + ".old")
