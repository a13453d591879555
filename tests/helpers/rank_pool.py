"""A gloo process group that lives as long as the test session, so that a distributed test costs milliseconds.

Spawning ranks, importing torch in each and connecting them takes seconds; sending a function to ranks that
wait takes none. ``RankPool.run`` sends one, and gives back what each rank returned. Whatever goes wrong in a
rank is an error in the test, with that rank's own words: an exception with its traceback, a death with its
signal, or a hang with the stack of every rank that did not answer. After a failure the group cannot be
trusted, so its processes are killed, and the next ``run`` starts new ones.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

WORLD_SIZES = (2, 4, 8)
START_SECONDS = 60
GRACE_SECONDS = 0.5
"""How long the other ranks may still report after the first failure, so that each own error is shown."""


class RankFailure(AssertionError):
    """At least one rank raised, died or did not answer in time; the message holds what each one said."""


class RankPool:
    """``world_size`` processes connected by gloo, one thread each, started at the first `run`.

    Args:
        world_size: number of ranks.
        timeout: seconds a job may take, unless `run` is told otherwise.
    """

    def __init__(self, world_size: int, *, timeout: float = 60.0) -> None:
        self.world_size = world_size
        self.timeout = timeout
        self._ranks: list[_Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(
        self, fn: Callable[..., Any], *args: Any, timeout: float | None = None, seed: int = 0
    ) -> list[Any]:
        """Call ``fn(*args)`` on every rank at once.

        ``fn`` is a module-level function; it asks ``torch.distributed`` for its rank. The same seed is set on
        each rank before. Process groups that it made are destroyed after it.

        Args:
            fn, args: pickled; tensors travel by value.
            timeout: seconds until the job counts as hanging (default: the pool's).
            seed: of torch, numpy and random, on every rank.
        Returns:
            What each rank returned, in rank order.
        Raises:
            RankFailure: a rank raised, died, returned something that cannot be pickled, or did not answer.
            TypeError: ``fn`` or an argument cannot be pickled.
        """
        try:
            job = pickle.dumps((fn, args, seed))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"{fn!r} and its arguments must be picklable, fn at module level: {error}"
            ) from error
        limit = self.timeout if timeout is None else timeout
        try:
            self._start()
            for rank in self._ranks:
                rank.pipe.send_bytes(job)
            return self._collect(limit)
        except (
            BaseException
        ):  # a KeyboardInterrupt or a test's own timeout leaves ranks in mid-collective too
            self._kill()
            raise

    def close(self) -> None:
        """Leave the group in order; the pool can be used again after."""
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.pipe.send_bytes(b"")
        for rank in self._ranks:
            rank.process.join(timeout=10)
        self._kill()

    def _start(self) -> None:
        if self._ranks:
            return
        context = waiting_context()
        self._folder = tempfile.TemporaryDirectory(prefix="rank_pool_")
        for index in range(self.world_size):
            self._ranks.append(_Rank(context, index, self.world_size, Path(self._folder.name)))
        self._collect(START_SECONDS)

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.process.close()
            rank.pipe.close()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _collect(self, timeout: float) -> list[Any]:
        """Wait for one answer of every rank; a first failure shortens the wait for the others."""
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < self.world_size:
            waiting = [
                rank for rank in self._ranks if rank.index not in results and rank.index not in failures
            ]
            ready = connection.wait([rank.pipe for rank in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in waiting:
                if rank.pipe in ready:
                    failed, value = rank.answer()
                    (failures if failed else results)[rank.index] = value
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if len(results) == self.world_size:
            return [results[index] for index in range(self.world_size)]
        silent = [rank for rank in self._ranks if rank.index not in results and rank.index not in failures]
        if not failures:  # with a failure elsewhere, silence is only its consequence
            failures = {
                rank.index: f"no answer within {timeout:g} s; it was here:\n{rank.stack()}" for rank in silent
            }
        parts = [f"rank {index} of {self.world_size}: {text}" for index, text in sorted(failures.items())]
        raise RankFailure("\n".join(parts))


class _Rank:
    """The parent's side of one rank: its process and the pipe to it (end-of-file when it dies)."""

    def __init__(self, context: Any, index: int, world_size: int, folder: Path) -> None:
        self.index = index
        self.pipe, theirs = context.Pipe()
        self._stack_file = folder / f"stack_{index}"
        self.process = context.Process(
            target=_serve,
            args=(theirs, index, world_size, str(folder / "store"), str(self._stack_file)),
            daemon=True,
        )
        self.process.start()
        theirs.close()

    def answer(self) -> tuple[bool, Any]:
        """(failed, value or traceback) that the rank sent, or how it died."""
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
            return True, f"the process died ({how})"

    def stack(self) -> str:
        """Where the rank is now, by faulthandler; also when it holds the interpreter's lock in C code."""
        with contextlib.suppress(OSError):
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.2)
            return self._stack_file.read_text()
        return "(no stack could be read)"


def waiting_context() -> Any:
    """Forks of a server that has imported torch already (1 s for 8 ranks); spawned processes elsewhere.

    FSDP2 and what it imports at first use (Dynamo) take 1.8 s, which each of 14 ranks would spend.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch._dynamo", "numpy", "pytest"])
    return context


def _serve(pipe: connection.Connection, rank: int, world_size: int, store: str, stack_file: str) -> None:
    """The rank's process: connect, then run jobs until an empty one."""
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
        torch.set_num_threads(1)
        answer: tuple[bool, Any] = (False, None)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(minutes=10),
            )
        except Exception:
            answer = (True, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
        try:
            while job := pipe.recv_bytes():
                pipe.send_bytes(_run_job(job))
        except (EOFError, ConnectionError):
            return  # the parent is gone
        dist.barrier()  # without it, processes that leave at different times abort the others' connections
        dist.destroy_process_group()


def _run_job(job: bytes) -> bytes:
    """The answer to one job, pickled: ``(failed, value or traceback)``."""
    try:
        fn, args, seed = pickle.loads(job)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  the code under test may use the legacy global generator
        torch.manual_seed(seed)
        value = fn(*args)
        dist.barrier()
        _destroy_groups()
        return pickle.dumps((False, value))
    except BaseException:
        return pickle.dumps((True, traceback.format_exc()))


def _destroy_groups() -> None:
    """Groups hold threads and sockets, and tests make hundreds of them. (The list is private to torch.)"""
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
