"""Saving in the background: one writer thread, one checkpoint in flight, errors brought back to the run."""

from __future__ import annotations

import threading
from pathlib import Path

from megalite.train.checkpoint import Snapshot, keep_last, write_snapshot


class Saver:
    """Writes snapshots under ``root`` while training goes on.

    Only one is in flight: a second `save` waits for the first. A failed write keeps every earlier checkpoint
    and is raised by the next `wait` or `save`.

    Args:
        root: the run's ``checkpoints`` folder.
        keep: checkpoints kept; 0 keeps all.
        asynchronous: False writes before `save` returns.
    """

    def __init__(self, root: Path, *, keep: int, asynchronous: bool) -> None:
        self.root = root
        self.keep = keep
        self.asynchronous = asynchronous
        self.last_saved: Path | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Start writing; returns at once when asynchronous."""
        self.wait()
        if not self.asynchronous:
            self._write(snapshot)
            self.wait()
            return
        # Not a daemon: leaving the interpreter waits for the files.
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint-writer")
        self._thread.start()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self.last_saved = write_snapshot(snapshot, self.root)
            keep_last(self.root, self.keep)
        except BaseException as error:  # handed to the training thread
            self._error = error

    def wait(self) -> None:
        """Wait for the write in flight and raise its error, if it had one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
