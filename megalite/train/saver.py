"""Saving in the background: one writer thread, one checkpoint in flight, errors brought back to the run."""

from __future__ import annotations

import threading
from pathlib import Path

from torch.distributed.checkpoint.metadata import MetadataIndex

from megalite.parallel.mesh import ALONE, Axis
from megalite.train.checkpoint_save import write_snapshot
from megalite.train.checkpoint_snapshot import Snapshot


class Saver:
    """Writes snapshots under ``root`` while training goes on.

    Only one is in flight: a second `save` waits for the first. A failed write, on whichever process, keeps
    every earlier checkpoint and is raised on all of them by the next `wait` or `save`.

    Args:
        root: the run's ``checkpoints`` folder.
        keep: checkpoints kept; 0 keeps all.
        asynchronous: False writes before `save` returns.
        axis: all processes; its group is for this alone, because the writing thread of each process uses it while
            training goes on (`host_axis`).
    """

    def __init__(self, root: Path, *, keep: int, asynchronous: bool, axis: Axis = ALONE) -> None:
        self.root = root
        self.keep = keep
        self.asynchronous = asynchronous
        self.axis = axis
        self.last_saved: Path | None = None
        self.mine: frozenset[MetadataIndex] | None = None
        """What this process writes, known after the first save: later snapshots copy nothing else."""
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
            saved, mine = write_snapshot(snapshot, self.root, axis=self.axis, keep=self.keep)
            self.last_saved, self.mine = saved, mine
        except BaseException as error:  # handed to the training thread
            self._error = error

    def wait(self) -> None:
        """Wait for the write in flight and raise its error, if it had one."""
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self) -> None:
        """Wait for the write in flight, whatever comes of it: before the run ends with another error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
