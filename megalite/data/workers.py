"""Independent pieces of work over processes: bounded queue, first error stops, nothing finished is lost."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_connections
from typing import TypeVar

from megalite.errors import StorageError

_DIED = (
    "a worker process was killed (out of memory?): run the same command again to go on where it stopped, with "
    "fewer --workers if memory is short"
)
Item = TypeVar("Item")
Result = TypeVar("Result")


def run_all(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    on_done: Callable[[Item, Result], None],
) -> None:
    """Call `function` on every item in `workers` processes and `on_done` here, in order of completion.

    With one worker everything runs in this process. Otherwise `function` and items must be picklable. After
    an error no further item is started; those that run are waited for, then the error is raised.

    Raises:
        StorageError: a worker process died (killed, or out of memory).
        Exception: the first one raised by `function` or `on_done`.
    """
    if workers <= 1:
        for item in items:
            on_done(item, function(item))
        return
    # Spawned, not forked: this process may have threads (tokenizers, the progress bar), which fork would copy
    # in whatever state their locks are.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            _drive(pool, function, items, 2 * workers, on_done)
        except BrokenProcessPool:
            raise StorageError(_DIED) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def run_apart(function: Callable[[Item], Result], item: Item) -> Result:
    """Call `function` in a process of its own, so that the memory it took is given back.

    Raises:
        StorageError: the process died.
        Exception: whatever `function` raises.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_follow_parent) as pool:
        try:
            return pool.submit(function, item).result()
        except BrokenProcessPool:
            raise StorageError(_DIED) from None


def _drive(
    pool: ProcessPoolExecutor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    in_flight: int,
    on_done: Callable[[Item, Result], None],
) -> None:
    running: dict[Future[Result], Item] = {}
    remaining = iter(items)
    exhausted = False
    while running or not exhausted:
        while not exhausted and len(running) < in_flight:
            try:
                item = next(remaining)
            except StopIteration:
                exhausted = True
                break
            running[pool.submit(function, item)] = item
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            on_done(running.pop(future), future.result())


def _start_worker() -> None:
    """Set up one of many workers: one thread for tokenizers."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _follow_parent()


def _follow_parent() -> None:
    """End with the parent process.

    A worker of a killed parent would otherwise wait for work for ever (it holds the queue's writing end
    itself).
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def _die_with(sentinel: int) -> None:
    wait_for_connections([sentinel])
    os._exit(1)
