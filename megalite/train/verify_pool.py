"""Processes that wait for layouts, so that each costs a fraction of a second.

They are started once, with torch imported already. A layout uses the first `world` of them: they join a process
group of their own, work, and leave it. Whatever goes wrong in a rank comes back in that rank's own words: an
exception with its traceback, a death with its signal, a hang with the place where every rank stood. After that the
processes are replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

GRACE_S = 0.5
"""How long other ranks may still report after the first failure, so that each own error is seen."""
START_S = 120.0
Kind = Literal["raised", "died", "hung"]
Work = Callable[[Any, torch.device], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class RankError:
    """What one rank said, or how it fell silent."""

    rank: int
    kind: Kind
    summary: str
    """One line."""
    details: str
    """Traceback or stack."""


class LayoutError(RuntimeError):
    """A layout did not come to its end on every rank."""

    def __init__(self, errors: list[RankError]) -> None:
        super().__init__("; ".join(f"rank {error.rank} {error.kind}: {error.summary}" for error in errors))
        self.errors = errors


class Pool:
    """`size` processes; each `run` uses as many of them as it needs.

    Args:
        size: processes.
        device: ``cpu`` (gloo) or ``cuda`` (nccl, one GPU for each).
        timeout_s: seconds after which a layout counts as hanging.
        preload: modules that every process has imported before it is asked for anything.
    """

    def __init__(
        self, size: int, *, device: str = "cpu", timeout_s: float = 60.0, preload: tuple[str, ...] = ()
    ) -> None:
        self.size = size
        self.device = device
        self.timeout_s = timeout_s
        self._preload = ["torch", "torch.distributed", "numpy", *preload]
        self._ranks: list[_Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._jobs = 0
        self._ready = False

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the processes, unless they are there, and do not wait for them; the first `run` does it otherwise."""
        if self._ranks:
            return
        self._folder = tempfile.TemporaryDirectory(prefix="megalite_verify_")
        context = _context(self._preload)
        for rank in range(self.size):
            self._ranks.append(_Rank(context, rank, Path(self._folder.name)))

    def run(
        self, world: int, work: Work, job: Any, *, meanwhile: Callable[[], object] = lambda: None
    ) -> list[Any]:
        """``work(job, device)`` on `world` processes that form the default process group; what each returned.

        Args:
            world: processes, at most the pool's size.
            work: a module-level function.
            job: anything that can be pickled.
            meanwhile: called in this process while they work.

        Raises:
            LayoutError: a rank raised, died or did not answer in time.
        """
        assert 1 <= world <= self.size, f"{world} of {self.size} processes"
        try:
            self.start()
            assert self._folder is not None
            if not self._ready:
                self._collect(self._ranks, START_S)
                self._ready = True
            self._jobs += 1
            store = str(Path(self._folder.name) / f"store_{self._jobs}")
            sent = pickle.dumps((work, job, world, store, self.device, self.timeout_s))
            for rank in self._ranks[:world]:
                rank.pipe.send_bytes(sent)
            meanwhile()
            return self._collect(self._ranks[:world], self.timeout_s)
        except BaseException:  # Ctrl-C leaves ranks in the middle of a collective too
            self.close()
            raise

    def close(self) -> None:
        """End the processes; the pool can be used again."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.pipe.close()
        self._ranks, self._ready = [], False
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _collect(self, ranks: list[_Rank], limit: float) -> list[Any]:
        """One answer of every rank; a first failure shortens the wait for the others."""
        answers: dict[int, Any] = {}
        errors: dict[int, RankError] = {}
        deadline = time.monotonic() + limit
        waiting = list(ranks)
        while waiting:
            ready = connection.wait([rank.pipe for rank in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [rank for rank in waiting if rank.pipe in ready]:
                waiting.remove(rank)
                answer = rank.answer()
                (errors if isinstance(answer, RankError) else answers)[rank.index] = answer
            if errors:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if not waiting and not errors:
            return [answers[rank.index] for rank in ranks]
        if not errors:  # with an error elsewhere, silence is only its consequence
            errors = {rank.index: rank.hung(limit) for rank in waiting}
        raise LayoutError([errors[index] for index in sorted(errors)])


class _Rank:
    """This side of one process: the process and the pipe to it (end-of-file when it dies)."""

    def __init__(self, context: Any, index: int, folder: Path) -> None:
        self.index = index
        self.pipe, theirs = context.Pipe()
        self._stack_file = folder / f"stack_{index}"
        self.process = context.Process(
            target=_serve, args=(theirs, index, str(self._stack_file)), daemon=True, name=f"verify-{index}"
        )
        self.process.start()
        theirs.close()

    def answer(self) -> Any:
        """What the rank sent, or how it died."""
        try:
            return pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            self.process.join(timeout=10)
            code = self.process.exitcode
            how = (
                f"signal {signal.Signals(-code).name}"
                if code is not None and code < 0
                else f"exit code {code}"
            )
            return RankError(self.index, "died", f"the process ended by {how}", "")

    def hung(self, limit: float) -> RankError:
        """Where a silent rank is, by faulthandler: also when it is in C code."""
        stack = "(no stack could be read)"
        with contextlib.suppress(OSError, AttributeError):
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.2)
            stack = self._stack_file.read_text() or stack
        return RankError(self.index, "hung", f"no answer within {limit:g} s, {_innermost(stack)}", stack)


def _innermost(stack: str) -> str:
    """The innermost place in our code of a stack that faulthandler wrote: ``in all_gather (collectives.py:77)``."""
    frames = re.findall(r'File "([^"]*)", line (\d+) in (\S+)', stack.partition("Current thread")[2] or stack)
    ours = [frame for frame in frames if f"{os.sep}megalite{os.sep}" in frame[0]] or frames
    if not ours:
        return "nobody knows where"
    file, line, function = ours[0]
    return f"in {function} ({Path(file).name}:{line})"


def _context(preload: list[str]) -> Any:
    """Forks of a server that has imported everything already; spawned processes where there is no such server."""
    # A process that is forked cannot use CUDA if its parent has; the server never touches it.
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    return context


def _serve(pipe: connection.Connection, rank: int, stack_file: str) -> None:
    """The process of a rank: work until the pipe is closed."""
    with open(stack_file, "w") as stacks:
        if hasattr(faulthandler, "register"):
            faulthandler.register(signal.SIGUSR1, file=stacks)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
        torch.set_num_threads(1)
        with contextlib.suppress(EOFError, ConnectionError):
            pipe.send_bytes(pickle.dumps("ready"))
            while True:
                pipe.send_bytes(_answer(rank, pipe.recv_bytes()))


def _answer(rank: int, message: bytes) -> bytes:
    """The answer to one job, pickled: what the work returned, or a `RankError`."""
    try:
        work, job, world, store, device_type, timeout_s = pickle.loads(message)
        device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.FileStore(store, world),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world,
            # Later than the parent's limit, so that a hang is a hang for all and not one rank's exception.
            timeout=datetime.timedelta(seconds=2 * timeout_s + START_S),
        )
        value = work(job, device)
        dist.barrier()  # without it, processes that leave at different times abort the others' connections
        dist.destroy_process_group()
        return pickle.dumps(value)
    except BaseException as error:
        summary = (str(error).strip().splitlines() or [""])[0]
        text = traceback.format_exc()
        return pickle.dumps(RankError(rank, "raised", f"{type(error).__name__}: {summary}", text))
