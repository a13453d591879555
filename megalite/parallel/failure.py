"""A rank that dies or hangs ends the whole run soon, and the message says which rank, where, and in what.

Left alone, the others wait for it: until the collective's timeout on NCCL, or for an error of the transport that
names a socket. So each process has a thread that writes a sign of life to the run's store every second, and looks
for three things: an alarm that another rank raised, a process of the same machine that is gone, and the next rank's
silence for `parallel.timeout_s`. The first alarm stays, so that all ranks name the same cause.

Times: a dead process is noticed within 2 s (its machine: when the transport reports it, or by silence), a hung one
after `parallel.timeout_s`; from then on every other process has `GRACE_S` to end by itself.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.distributed import Store  # type: ignore[attr-defined]

from megalite.errors import ExitCode, RankLostError
from megalite.parallel.calls import CallRecord

INTERVAL_S = 1.0
"""Between two signs of life; 512 ranks send 1,500 small requests a second, the store serves many times that."""
GRACE_S = 5.0
"""From the alarm to the end of a process that does not end by itself, because it waits in a collective."""
LEFT = b"left"
"""In the place of a sign of life: this rank needs no watching any more."""
LISTED = 8
"""Ranks whose place is told when none is gone."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank's process is, so that others on the same machine can see whether it lives."""

    host: str
    pid: int
    namespace: str
    """The machine's boot and the process's pid namespace: a pid means something to those who share both."""
    started: str
    """Start time in ticks: the pid may be another process's by now."""

    @classmethod
    def here(cls) -> Place:
        """This process's."""
        pid = os.getpid()
        namespace = ""
        with contextlib.suppress(OSError):  # not Linux: deaths are then seen by silence only
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            namespace = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        return cls(socket.gethostname(), pid, namespace, _status(pid)[1])

    def is_gone(self, seen_from: Place) -> bool:
        """True if the process certainly ended; False also if that cannot be seen from there."""
        if not self.namespace or self.namespace != seen_from.namespace:
            return False
        state, started = _status(self.pid)
        return state in ("", "Z", "X") or started != self.started


class Watch:
    """Signs of life of this process and an eye on the others.

    Args:
        store: a connection of its own to a store that belongs to this start of the run.
        rank, world_size: this process among all.
        calls: the mesh's record of collectives.
        timeout_s: silence after which a rank counts as hung (`parallel.timeout_s`).
        end: ends the process with an exit code, whatever its main thread does.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        calls: CallRecord,
        timeout_s: float,
        *,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.rank = rank
        self.calls = calls
        self.timeout_s = timeout_s
        self.interval_s = min(INTERVAL_S, timeout_s / 10)
        self._store = store
        self._here = Place.here()
        self._beats = 0
        self._next = (rank + 1) % world_size
        self._heard = (b"", time.monotonic())
        self._cause = ""
        self._end = end
        self._wake = threading.Event()
        self._called_off = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._beat()
        store.set(f"place/{rank}", json.dumps(asdict(self._here)))
        places = store.multi_get([f"place/{other}" for other in range(world_size)])
        self.places = [Place(**json.loads(text)) for text in places]
        self._thread.start()
        # A thread that stands in C++ while the interpreter ends would abort the process.
        atexit.register(self.stop)

    def stop(self) -> None:
        """No more signs of life, and no more eye on the others: before the last barrier, or a rank's own error."""
        atexit.unregister(self.stop)
        self._called_off.set()
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        with contextlib.suppress(RuntimeError):  # no store, nobody to tell
            self._store.set(f"beat/{self.rank}", LEFT.decode())

    def lost(self) -> str:
        """Why a collective failed, if a rank is gone, silent or failed before this one; empty if none is.

        Takes up to three intervals (at least 2 s), the time to tell silence from a pause. Afterwards this process
        ends within `GRACE_S`.
        """
        cause = ""
        try:
            first = self._all_beats()
            until = time.monotonic() + max(2.0, 3 * self.interval_s)
            while not (cause := self._alarm() or self._dead_neighbours()) and time.monotonic() < until:
                time.sleep(0.05)
            if not cause:
                second = self._all_beats()
                still = [r for r, beat in enumerate(second) if beat == first[r] and beat != LEFT]
                silent = [r for r in still if r != self.rank]
                cause = self._raise_alarm("does not answer", silent) if silent else ""
        except RuntimeError as error:
            # The thread may have heard the cause and said so, upon which rank 0 left, and the store with it.
            cause = self._cause or self._no_store(error)
        if cause:
            self._abandon(cause)
            self._keep_store()
        return cause

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank ends with an error of its own, and stop; rank 0, once they have read it."""
        text = f"rank {self.rank} on host {self._here.host} failed: {_first_line(error)}"
        with contextlib.suppress(RuntimeError):  # no store, nobody to tell
            self._store.compare_set("alarm", "", text)
        self.stop()
        self._keep_store()

    def positions(self) -> str:
        """What the first ranks were doing, by their last signs of life."""
        with contextlib.suppress(RuntimeError):
            texts = [_calls_of(beat) for beat in self._all_beats()[:LISTED]]
            more = ", …" if len(self.places) > LISTED else ""
            return "; ".join(f"rank {rank} {text}" for rank, text in enumerate(texts)) + more
        return "the store does not answer"

    def _run(self) -> None:
        while not self._wake.wait(self.interval_s):
            try:
                self._beat()
                cause = self._alarm() or self._dead_neighbours() or self._silent_neighbour()
            except RuntimeError as error:
                cause = self._no_store(error)
            if cause and not self._wake.is_set():
                self._abandon(cause)
                break
        # The main thread has a while to say so itself; if it cannot, it waits for the lost rank.
        if self._cause and not self._called_off.wait(GRACE_S):
            print(f"megalite: error: {lost_message(self, self._cause)}", file=sys.stderr, flush=True)
            self._end(ExitCode.RANK_LOST)

    def _abandon(self, cause: str) -> None:
        atexit.unregister(self.stop)  # threads and sockets that hang at the interpreter's end are ended too
        self._cause = self._cause or cause
        self._wake.set()
        with contextlib.suppress(RuntimeError):  # no store, nobody to tell
            self._store.set(f"knows/{self.rank}", "1")

    def _keep_store(self) -> None:
        """Rank 0, which may hold the store, ends last: after all that are left have read the alarm there."""
        until = time.monotonic() + GRACE_S - 1.0
        waiting = [rank for rank in range(len(self.places)) if rank != self.rank] if self.rank == 0 else []
        with contextlib.suppress(RuntimeError):
            while (waiting := [r for r in waiting if self._needs_store(r)]) and time.monotonic() < until:
                time.sleep(0.05)

    def _needs_store(self, rank: int) -> bool:
        """True of a rank that lives and has neither read the alarm nor left."""
        if self.places[rank].is_gone(self._here) or self._store.check([f"knows/{rank}"]):
            return False
        return self._store.get(f"beat/{rank}") != LEFT

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self.rank}", f"{self._beats} {self.calls}")

    def _all_beats(self) -> list[bytes]:
        return self._store.multi_get([f"beat/{rank}" for rank in range(len(self.places))])

    def _alarm(self) -> str:
        return self._store.get("alarm").decode() if self._store.check(["alarm"]) else ""

    def _dead_neighbours(self) -> str:
        gone = [r for r, place in enumerate(self.places) if r != self.rank and place.is_gone(self._here)]
        gone = [r for r in gone if self._store.get(f"beat/{r}") != LEFT]
        return self._raise_alarm("is gone", gone) if gone else ""

    def _silent_neighbour(self) -> str:
        """The next rank's silence; with the ranks in a ring, each one has a neighbour that hears it."""
        beat, now = self._store.get(f"beat/{self._next}"), time.monotonic()
        if beat != self._heard[0] or beat == LEFT:
            self._heard = (beat, now)
        silent = now - self._heard[1] > self.timeout_s
        return self._raise_alarm(f"has not answered for {self.timeout_s:g} s", [self._next]) if silent else ""

    def _raise_alarm(self, what: str, ranks: list[int]) -> str:
        """Tell everybody what happened to ranks; returns the alarm that stands, which may be an earlier one."""
        rank, place = ranks[0], self.places[ranks[0]]
        doing = _calls_of(self._store.get(f"beat/{rank}"))
        others = f" (so are ranks {', '.join(map(str, ranks[1:LISTED]))})" if ranks[1:] else ""
        text = f"rank {rank} on host {place.host} {what}{others}, last heard of {doing}"
        return self._store.compare_set("alarm", "", text).decode()

    def _no_store(self, error: RuntimeError) -> str:
        if (first := self.places[0]) != self._here and first.is_gone(self._here):
            return f"rank 0 on host {first.host} is gone, and the run's store with it"
        return (
            f"the run's store at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} is gone "
            f"({_first_line(error)}): the launcher there ended, rank 0 on host {first.host} is gone, or the network is"
        )


def lost_message(watch: Watch, cause: str) -> str:
    """The cause, and what this rank did."""
    return f"{cause}; rank {watch.rank} was {watch.calls}"


@contextlib.contextmanager
def ends_together(watch: Watch | None) -> Iterator[None]:
    """Around a run: an error on one rank ends all, and an error because of another rank names that rank.

    Raises:
        RankLostError: a collective failed because a rank is gone, hung, or ended with an error; or it did not end
            in time though all ranks are there.
    """
    if watch is None:
        yield
        return
    try:
        yield
    except RuntimeError as error:  # all of torch.distributed's are
        with _sigterm_ignored():
            cause = watch.lost()
        if cause:
            raise RankLostError(lost_message(watch, cause)) from error
        if "timed out" in str(error).lower():
            text = f"a collective did not end within parallel.timeout_s={watch.timeout_s:g}, no rank is gone"
            text = f"{text}: {watch.positions()}"
            watch.fail(RankLostError(text))
            raise RankLostError(text) from error
        watch.fail(error)
        raise
    except BaseException as error:
        watch.fail(error)
        raise


@contextlib.contextmanager
def _sigterm_ignored() -> Iterator[None]:
    """torchrun ends the survivors of a death with SIGTERM within 0.1 s, before they could say what they know."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _status(pid: int) -> tuple[str, str]:
    """State letter and start time of a process from /proc; empty if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return fields[0], fields[19]


def _calls_of(beat: bytes) -> str:
    return beat.decode().partition(" ")[2] or "at its end"


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
