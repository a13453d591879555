"""The progress bar of ``megalite data prepare``, on stderr; one line per stage where that is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn


class StageProgress:
    """Implements `megalite.data.stages.Progress` with rich; a context manager."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._name = ""
        self._began = time.perf_counter()
        self._done = 0

    def stage(self, name: str, total: int) -> None:
        """Begin a stage; the one before is over."""
        self._finish()
        self._name, self._began, self._done = name, time.perf_counter(), 0
        self._task = self._bar.add_task(name, total=max(total, 1), speed="")

    def advance(self, amount: int) -> None:
        """More of the stage is done; amounts of bytes also show a speed."""
        if self._task is None:
            return
        self._done += amount
        seconds = time.perf_counter() - self._began
        speed = f"{self._done / 1e6 / seconds:.1f} MB/s" if self._done > 1_000_000 and seconds > 0 else ""
        self._bar.update(self._task, advance=amount, speed=speed)

    def note(self, message: str) -> None:
        """A line above the bar."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> StageProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        self._bar.stop()

    def _finish(self) -> None:
        if self._task is not None and not self._console.is_terminal:
            self.note(f"{self._name}: {time.perf_counter() - self._began:.1f} s")
