"""The pool for large tensors: which addresses it gives, and what torch sees of it.

Each check runs in a process of its own, since a pool stays for the rest of a process; forked from one that has
imported torch, which takes longer than a check.
"""

from __future__ import annotations

import pytest

from megalite_kernels import memory, pool
from tests.helpers.processes import run_script

pytestmark = pytest.mark.skipif(
    pool.library() is None, reason="the pool is not built: it needs Linux, a compiler and torch's headers"
)

MB = 1 << 20
START = """
import gc, os, threading, torch
from megalite_kernels import memory, pool
MB = 1 << 20
def make(size): return torch.empty(size, dtype=torch.uint8)
def inside(tensor): return pool.owns(tensor.data_ptr())
"""


def run(code: str, *, install: str = "pool.install(64 * MB)") -> None:
    run_script(f"{START}\nassert {install}\n{code}")


def test_only_large_tensors_come_from_the_pool() -> None:
    run("""
assert pool.stats() == (0, 0, 0, 0, 0)
assert inside(make(pool.LEAST_BYTES)) and not inside(make(pool.LEAST_BYTES - 1)) and not inside(make(0))
assert inside(torch.empty(64, 1000).clone()) and not pool.owns(0)
""")


def test_blocks_are_aligned_and_begin_at_different_places_of_a_page() -> None:
    run("""
tensors = [make(size) for size in (MB, MB, MB + 1, MB, 70001, MB)]
addresses = [t.data_ptr() for t in tensors]
assert all(a % 64 == 0 for a in addresses), addresses
assert len({a % 4096 for a in addresses}) == len(addresses), addresses
for number, tensor in enumerate(tensors):
    tensor.fill_(number)
for number, tensor in enumerate(tensors):
    assert (tensor == number).all()
""")


def test_the_smallest_hole_that_fits_is_taken() -> None:
    run("""
a, wall1, b, wall2, c, wall3 = (make(size) for size in (8 * MB, MB, 2 * MB, MB, 4 * MB, MB))
places = {8: a.data_ptr(), 2: b.data_ptr(), 4: c.data_ptr()}
del a, b, c
assert pool.stats().holes == 3
three = make(3 * MB)
assert three.data_ptr() == places[4]
two = make(2 * MB)
assert two.data_ptr() == places[2]
assert make(8 * MB).data_ptr() == places[8]
""")


def test_neighbours_that_are_free_are_one_hole() -> None:
    """Whichever of them is freed last: the one in front, between or behind."""
    run("""
import itertools
for order in itertools.permutations(range(3)):
    blocks = [make(MB) for _ in range(3)]
    wall, first = make(MB), blocks[0].data_ptr()
    for number in order:
        blocks[number] = None
    assert pool.stats().holes == 1, order
    assert make(3 * MB).data_ptr() == first, order
    del wall
    assert pool.stats()[:1] == (0,) and pool.stats().holes == 0, order
    assert make(MB).data_ptr() == first
""")


def test_a_repeated_step_reaches_no_new_memory() -> None:
    """Each leaves a tensor at the end of what it used, which the next step's must not all be put behind."""
    run("""
survivor, reached = None, []
for turn in range(20):
    made = [make(MB + 4096 * layer) for layer in range(6)]
    survivor, made = made[-1], None
    reached.append(pool.stats().reached_bytes)
assert set(reached[3:]) == {reached[3]} and reached[3] < 8.5 * MB, reached
assert pool.stats().used_bytes < 1.1 * MB < 6 * MB < pool.stats(reset_peak=True).peak_bytes <= reached[3]
assert pool.stats().peak_bytes == pool.stats().used_bytes
""")


def test_without_room_the_previous_allocator_serves() -> None:
    run("""
tensors = [make(20 * MB) for _ in range(4)]
assert [inside(t) for t in tensors] == [True, True, True, False]
huge = make(65 * MB)
assert not inside(huge)
for number, tensor in enumerate([*tensors, huge]):
    tensor.fill_(number)
assert [int(t[-1]) for t in [*tensors, huge]] == [0, 1, 2, 3, 4]
del tensors, huge, tensor
assert inside(make(60 * MB)), pool.stats()
""")


def test_too_much_is_refused_as_ever() -> None:
    run("""
try:
    make(1 << 60)
except RuntimeError as error:
    assert f"you tried to allocate {1 << 60} bytes" in str(error), error
else:
    raise AssertionError("an exbibyte was allocated")
""")


def test_tensors_from_before_and_resized_ones_are_freed_where_they_came_from() -> None:
    run(
        """
del before
tensor = make(MB)
tensor.resize_(5 * MB).fill_(7)
assert inside(tensor) and (tensor == 7).all()
tensor.resize_(10)
shared = make(MB).share_memory_()
assert shared.is_shared() and not inside(shared)
del tensor, shared
gc.collect()
assert pool.stats().blocks == 0, pool.stats()
""",
        install="(before := make(3 * MB)) is not None and pool.install(64 * MB) and not inside(before)",
    )


def test_threads_do_not_get_each_others_blocks() -> None:
    """`_foreach_add` makes many tensors without Python's lock, so the threads are in the pool at the same time."""
    run(
        """
wrong = []
def work(number):
    zeros = [torch.zeros(pool.LEAST_BYTES + 64 * i, dtype=torch.uint8) for i in range(100)]
    for turn in range(100):
        made = torch._foreach_add(zeros, number)
        if turn % 10 == 0 and not all(bool((tensor == number).all()) for tensor in made):
            wrong.append((number, turn))
threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not wrong, wrong
gc.collect()
assert pool.stats().blocks == pool.stats().holes == pool.stats().used_bytes == 0, pool.stats()
""",
        install="torch.set_num_threads(1) is None and pool.install(512 * MB)",
    )


def test_kernels_work_in_the_pool_too() -> None:
    """What a native kernel needs for itself is taken and given back; where there is no room, it comes from malloc."""
    run(
        """
from megalite_kernels.native.linear import multiply_
x, w, out = (torch.randn(n, 256) for n in (300, 256, 300))
expected = x @ w
used = pool.stats(reset_peak=True).used_bytes
multiply_(out, x, w)
torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
after = pool.stats()
assert after.used_bytes == used and after.peak_bytes > used + 256 * 256 * 4, (used, after)
full = [make(64 << 10) for _ in range(1024)]
pool.stats(reset_peak=True)
multiply_(out.zero_(), x, w)
torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
assert pool.stats().peak_bytes == pool.stats().used_bytes
"""
    )


def test_a_child_process_has_a_pool_of_its_own_and_no_lock_of_another_thread() -> None:
    run("""
import time
stop = threading.Event()
def churn():
    while not stop.is_set():
        make(100_000)
threads = [threading.Thread(target=churn) for _ in range(2)]
for thread in threads: thread.start()
parents = torch.full((MB,), 1, dtype=torch.uint8)
for _ in range(20):
    child = os.fork()
    if child == 0:
        own = make(MB).fill_(2)
        parents.fill_(3)
        os._exit(0 if inside(own) and (own == 2).all() else 1)
    deadline = time.monotonic() + 30
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    if done[0] == 0:
        os.kill(child, 9)
    assert done[0] and os.waitstatus_to_exitcode(done[1]) == 0, "a child hangs or got a wrong block"
stop.set()
for thread in threads: thread.join()
assert (parents == 1).all()
""")


def test_released_memory_goes_back_and_comes_again() -> None:
    run("""
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
kept = make(4 * MB).fill_(1)
hole = make(20 * MB).fill_(1)
wall = make(MB).fill_(1)
tail = make(20 * MB).fill_(1)
del hole, tail
full = resident()
pool.release()
assert full - resident() > 32 * MB, (full, resident())
assert (kept == 1).all() and (wall == 1).all()
again = make(20 * MB)
assert inside(again) and (again.fill_(5) == 5).all()
""")


def test_the_profiler_sees_what_it_sees_without() -> None:
    run("""
from torch.profiler import ProfilerActivity, profile
def sums():
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = make(3 * MB)
        make(5 * MB)
        del kept
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sorted(e.nbytes() for e in events)
assert sums() == [-5 * MB, -3 * MB, 3 * MB, 5 * MB], sums()
""")


def test_copies_on_write_share_a_block_until_one_is_written() -> None:
    """torch puts a deleter of its own around ours for these."""
    run("""
first = torch.full((MB,), 1, dtype=torch.uint8)
second = torch._lazy_clone(first)
assert pool.stats().blocks == 1 and torch._C._is_cow_tensor(first)
second.fill_(2)
assert pool.stats().blocks == 2 and (first == 1).all() and inside(second)
del first, second
assert pool.stats().blocks == 0
""")


@pytest.mark.parametrize("limited", [False, True])
def test_trainers_get_a_pool_where_addresses_are_free(limited: bool) -> None:
    limit = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))" if limited else "pass"
    )
    expected = memory._addresses_are_free() and not limited
    run(
        f"""
assert inside(make(MB)) == {expected}
assert ("pool" in memory.allocator()) == {expected}
made = memory.zeros_in_huge_pages(32 * MB, torch.uint8, torch.device("cpu"))
assert inside(made) == {expected} and not made.any()
assert memory.keep_freed_pages() and inside(make(MB)) == {expected}, "a second call changed it"
memory.release_freed_pages()
""",
        install=f"not inside(make(MB))\n{limit}\nassert memory.keep_freed_pages()",
    )


def test_a_library_for_another_torch_is_not_used() -> None:
    run(
        """
torch.__version__ = "1.0.0"
assert pool.library() is None and not pool.install(64 * MB) and not inside(make(MB))
assert pool.stats() == (0, 0, 0, 0, 0)
pool.release()
""",
        install="True",
    )


def test_importing_installs_nothing() -> None:
    run(
        "import megalite.train.setup\nassert not inside(make(MB)) and pool.stats().blocks == 0",
        install="True",
    )
