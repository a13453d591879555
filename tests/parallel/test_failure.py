"""Signs of life and meeting places, on stores inside one process: no ranks are started here."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
from torch.distributed import HashStore

from megalite.errors import ExitCode, RankLostError, UserError
from megalite.parallel.calls import CallRecord
from megalite.parallel.failure import Place, Watch, ends_together
from megalite.parallel.rendezvous import agree_on_name, open_store


def in_threads(*jobs):
    """Results of functions that wait for each other."""
    results = [None] * len(jobs)

    def run(index: int) -> None:
        results[index] = jobs[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def two_watches(timeout_s: float = 600.0, ends: Callable[[int], object] = lambda code: None) -> list[Watch]:
    store = HashStore()
    return in_threads(
        *(lambda rank=rank: Watch(store, rank, 2, CallRecord(), timeout_s, end=ends) for rank in (0, 1))
    )


@pytest.fixture
def watches():
    made = two_watches()
    yield made
    for watch in made:
        watch.stop()


def test_the_record_says_what_the_process_does():
    calls = CallRecord()
    assert str(calls) == "before its first collective"
    calls.step = 17
    for _ in range(3):
        calls.enter("all_reduce", "dp")
    assert str(calls) == "in all_reduce over dp (collective 3, step 17)"


def test_a_place_tells_the_living_from_the_dead():
    here = Place.here()
    assert not here.is_gone(here)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        there = dataclasses.replace(here, pid=child.pid, started=_started(child.pid))
        assert not there.is_gone(here)
        child.kill()
        while _state(child.pid) != "Z":  # killed and not collected by its parent: a zombie
            pass
        assert there.is_gone(here)
    assert there.is_gone(here)
    assert dataclasses.replace(here, started="1").is_gone(here)  # the number is another process's by now
    assert not dataclasses.replace(there, namespace="another machine").is_gone(here)  # cannot be seen


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def _started(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[19]


def test_an_error_of_ones_own_is_told_to_the_others_and_raised_as_it_is(watches):
    first, second = watches
    with pytest.raises(UserError, match="no such data"), ends_together(first):
        raise UserError("no such data")
    assert "rank 0 on host" in second.lost()
    assert second.lost().endswith("failed: UserError: no such data")


def test_a_transport_error_because_of_another_rank_names_that_rank(watches):
    first, second = watches
    second.calls.enter("all_gather", "tp")
    first.fail(ValueError("odd"))
    says = r"rank 0 on host \S+ failed: ValueError: odd; rank 1 was in all_gather over tp \(collective 1\)"
    with pytest.raises(RankLostError, match=says) as caught, ends_together(second):
        raise RuntimeError("Connection closed by peer")
    assert caught.value.exit_code == ExitCode.RANK_LOST == 69


def test_a_process_that_does_not_end_by_itself_is_ended(monkeypatch, capsys):
    monkeypatch.setattr("megalite.parallel.failure.GRACE_S", 0.1)
    codes: list[int] = []
    first, second = two_watches(timeout_s=2.0, ends=codes.append)
    first.fail(ValueError("odd"))
    second._thread.join(timeout=10.0)
    assert codes == [ExitCode.RANK_LOST]
    assert "failed: ValueError: odd; rank 1 was before its first collective" in capsys.readouterr().err
    second.stop()


def test_the_first_alarm_stays(watches):
    first, second = watches
    first.fail(ValueError("one"))
    second.fail(ValueError("two"))
    assert second.lost().endswith("one")


class Gone:
    """A store whose server left."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        def request(*arguments: object) -> object:
            raise RuntimeError("Connection reset by peer")

        return request


def test_what_was_heard_outlives_the_store(watches):
    """The first rank leaves, and the store with it, as soon as the others' threads have read the alarm."""
    first, second = watches
    first.fail(ValueError("odd"))
    second._store = Gone()
    assert second.lost().endswith("failed: ValueError: odd")


def test_the_first_rank_stays_with_the_store_until_its_error_is_known(watches):
    first, second = watches
    first.fail(ValueError("odd"))
    assert second._store.check(["knows/1"])
    assert second._cause.endswith("failed: ValueError: odd")


def test_the_first_rank_does_not_stay_for_those_that_left(watches):
    first, second = watches
    second.stop()
    start = time.monotonic()
    first.fail(ValueError("odd"))
    assert time.monotonic() - start < 2.0  # of the 4 s that it would stay


def test_silence_is_noticed():
    first, second = two_watches(timeout_s=1.0)
    second._beat = lambda: None  # no sign of life any more, though its process lives
    assert re.search(r"rank 1 on host \S+ (does not answer|has not answered for 1 s)", first.lost())
    first.stop()
    second.stop()


def test_a_rank_that_left_is_neither_silent_nor_gone(watches):
    first, second = watches
    second.stop()
    first.places[1] = dataclasses.replace(first.places[1], started="1")  # as if its process had ended
    assert first.lost() == ""


def test_a_rank_that_only_waits_is_not_accused(watches):
    assert watches[0].lost() == ""
    text = "Timed out waiting 5000ms for recv operation to complete"
    says = r"no rank is gone: rank 0 before its first collective; rank 1 before"
    with pytest.raises(RankLostError, match=says), ends_together(watches[0]):
        raise RuntimeError(text)
    assert "did not end within parallel.timeout_s=600" in watches[1].lost()


def test_every_start_gets_a_name_of_its_own_though_the_store_remembers_the_last():
    store = HashStore()

    def start() -> list[str]:
        return in_threads(*(lambda rank=rank: agree_on_name(store, rank, 3, 30.0) for rank in range(3)))

    names = start() + start()
    assert len(set(names[:3])) == len(set(names[3:])) == 1
    assert names[0] != names[3]


def test_tokens_of_the_dead_do_not_satisfy_the_first_rank():
    store = HashStore()
    store.set("join/1", "a token of a process that was killed while it waited")
    with pytest.raises(UserError, match=r"1 of 2 ranks did not come within 0\.2 s: 1"):
        agree_on_name(store, 0, 2, 0.2)


def test_what_a_launcher_must_set_is_named(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="WORLD_SIZE=2 but MASTER_ADDR, MASTER_PORT not set"):
        open_store(1.0)
