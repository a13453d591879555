"""What one rank did, in order: collectives launched and waited for, matrix products and kernels run.

Recorded below our code, by torch's dispatcher and by `Work.wait` itself, never by lists that the code under test
writes, so that it shows what happens and not what was meant. The backward pass is recorded too: autograd hands the
dispatch mode on to its threads. (Of functional collectives the launch is always seen, the wait only where
`wait_tensor` is called on a plain tensor: torch's asynchronous tensors wait out of sight.)

    with trace() as events:
        layer(x).sum().backward()
    assert_hidden(events, "reduce_scatter", by="mm")    # launched, then a product, then waited for
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "send": "send",
    "recv_": "recv",
}
"""Names of torch's ops → what they are called here; others keep their op's name."""

PRODUCTS = frozenset({"aten.mm", "aten.addmm", "aten.addmm_", "aten.bmm", "aten.baddbmm", "aten.linear"})
KERNELS_OF_PRODUCTS = (
    "megalite.linear_fwd",
    "megalite.linear_dgrad",
    "megalite.linear_weight_grad",
    "megalite.linear_cross_entropy",
    "megalite.fp8_product",
)


@dataclass(eq=False)
class Launch:
    """A collective that was started."""

    kind: str
    at: int
    """Place in the order of all events."""
    group: tuple[int, ...]
    """Global ranks."""
    bytes: int
    """Of the largest tensor that it got: for gathers and scatters the whole one."""
    waited: int | None = None
    """Place of the first wait for it; None: nobody did."""
    work: Any = field(default=None, repr=False)

    @property
    def sent_bytes(self) -> float:
        """What this rank sends if the collective runs as a ring (nothing for a receive)."""
        n = len(self.group)
        if self.kind in ("all_gather", "reduce_scatter", "all_to_all"):
            return self.bytes * (n - 1) / n
        return {"all_reduce": 2 * (n - 1) / n, "recv": 0, "barrier": 0}.get(self.kind, 1) * self.bytes


@dataclass(eq=False)
class Compute:
    """A matrix product of torch or an op of megalite, e.g. aten.mm or megalite.rms_norm_fwd."""

    name: str
    at: int

    def is_a(self, kind: str) -> bool:
        """`kind` is "mm" (matrix products, ours too), "any", or the beginning of a name after the dot."""
        if kind == "any":
            return True
        if kind == "mm":
            return self.name in PRODUCTS or self.name.startswith(KERNELS_OF_PRODUCTS)
        return self.name.partition(".")[2].startswith(kind)


class Events:
    """All that a rank did under `trace`."""

    def __init__(self) -> None:
        self.all: list[Launch | Compute | tuple[str, Launch]] = []
        """In order; a wait is ("wait", its launch), also if it is not the first."""

    @property
    def launches(self) -> list[Launch]:
        return [event for event in self.all if isinstance(event, Launch)]

    @property
    def computes(self) -> list[Compute]:
        return [event for event in self.all if isinstance(event, Compute)]

    def of(self, kind: str, group: tuple[int, ...] | None = None) -> list[Launch]:
        """Launches of one kind ("any": all), of one group if given."""
        return [
            launch
            for launch in self.launches
            if kind in ("any", launch.kind) and group in (None, launch.group)
        ]

    def counts(self) -> Counter[str]:
        """How many launches there were of each kind."""
        return Counter(launch.kind for launch in self.launches)

    def bytes_of(self, kind: str, group: tuple[int, ...] | None = None) -> int:
        """Sum of the bytes of such launches."""
        return sum(launch.bytes for launch in self.of(kind, group))

    def bytes_by_group(self) -> dict[tuple[int, ...], dict[str, int]]:
        """Global ranks → kind → sum of the bytes."""
        result: dict[tuple[int, ...], dict[str, int]] = {}
        for launch in self.launches:
            kinds = result.setdefault(launch.group, {})
            kinds[launch.kind] = kinds.get(launch.kind, 0) + launch.bytes
        return result

    def behind(self, launch: Launch, by: str = "any") -> list[Compute]:
        """What ran between a launch and the first wait for it."""
        end = len(self.all) if launch.waited is None else launch.waited
        return [c for c in self.computes if launch.at < c.at < end and c.is_a(by)]

    def __str__(self) -> str:
        """One event a line, for messages of failed assertions."""
        lines = []
        for at, event in enumerate(self.all):
            if isinstance(event, Launch):
                lines.append(f"{at:4} launch {event.kind} of {event.bytes} B over {list(event.group)}")
            elif isinstance(event, Compute):
                lines.append(f"{at:4}   {event.name}")
            else:
                lines.append(f"{at:4} wait   {event[1].kind} launched at {event[1].at}")
        return "\n".join(lines)


def assert_hidden(
    events: Events,
    launch: str,
    *,
    by: str = "mm",
    group: tuple[int, ...] | None = None,
    exposed: int = 0,
    count: int | None = None,
) -> None:
    """Every such collective was launched before work that ran before it was waited for.

    Args:
        launch: kind of collective, or "any".
        by: what hides it; see `Compute.is_a`.
        group: only launches over these global ranks.
        exposed: how many have nothing to hide behind, exactly.
        count: how many there are, exactly; None: at least one.
    """
    found = events.of(launch, group)
    assert found, f"no {launch} was launched:\n{events}"
    assert count is None or len(found) == count, f"{len(found)} {launch}, not {count}:\n{events}"
    for one in found:
        assert one.waited is not None, f"nobody waited for the {one.kind} at {one.at}:\n{events}"
    bare = [one for one in found if not events.behind(one, by)]
    where = ", ".join(f"{one.kind} at {one.at}" for one in bare)
    assert len(bare) == exposed, f"{len(bare)} exposed, not {exposed} ({where}):\n{events}"


@contextlib.contextmanager
def trace() -> Iterator[Events]:
    """Record what this process does inside the block."""
    events = Events()
    with _Recorder(events), _patched_wait(events):
        yield events
    for launch in events.launches:
        launch.work = None  # it keeps the tensors alive


@contextlib.contextmanager
def impatient(module: Any, *names: str) -> Iterator[None]:
    """A planted error: functions of `module` that start collectives wait for them before they return.

    Args:
        module: the one that uses them, e.g. megalite.parallel.tensor.
        names: functions that return a work or a list of them, alone or behind a tensor.
    """
    originals = {name: getattr(module, name) for name in names}
    for name, start in originals.items():
        setattr(module, name, _and_wait(start))
    try:
        yield
    finally:
        for name, start in originals.items():
            setattr(module, name, start)


def _and_wait(start: Callable[..., Any]) -> Callable[..., Any]:
    def started(*args: Any, **kwargs: Any) -> Any:
        out = start(*args, **kwargs)
        works = out[-1] if isinstance(out, tuple) else out
        for work in works if isinstance(works, list) else [works]:
            if work is not None:
                work.wait()
        nothing: Any = [] if isinstance(works, list) else None
        return (*out[:-1], nothing) if isinstance(out, tuple) else nothing

    return started


class _Recorder(TorchDispatchMode):
    def __init__(self, events: Events) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        order = self.events.all
        if f"{space}.{name}" in PRODUCTS or space == "megalite":
            order.append(Compute(f"{space}.{name}", len(order)))
        if space == "_c10d_functional" and name == "wait_tensor":
            _note_wait(self.events, lambda launch: _same_memory(launch.work, args[0]))
        out = func(*args, **(kwargs or {}))
        if space == "c10d" or (space == "_c10d_functional" and name in KINDS):
            # Recorded once it runs: launched means that the library has it.
            group = _group_ranks([*args, *(kwargs or {}).values()])
            launch = Launch(KINDS.get(name, name), len(order), group, _largest([args, kwargs, out]))
            launch.work = _work_of(out) if space == "c10d" else out
            order.append(launch)
        return out


@contextlib.contextmanager
def _patched_wait(events: Events) -> Iterator[None]:
    """`Work.wait` notes itself while the block runs. Every backend's work is this class to Python."""
    original = dist.Work.wait

    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        _note_wait(events, lambda launch: launch.work is work)
        return original(work, *args, **kwargs)

    dist.Work.wait = wait
    try:
        yield
    finally:
        dist.Work.wait = original


def _note_wait(events: Events, is_it: Callable[[Launch], bool]) -> None:
    for launch in reversed(events.launches):
        if is_it(launch):
            launch.waited = len(events.all) if launch.waited is None else launch.waited
            events.all.append(("wait", launch))
            return


def _work_of(out: Any) -> Any:
    """The Work that a c10d op returns, alone or behind its tensors: the same Python object that callers get."""
    boxed = out[-1] if isinstance(out, (tuple, list)) else out
    return dist.Work.unbox(boxed)


def _group_ranks(args: list[Any]) -> tuple[int, ...]:
    """Global ranks of the group among the arguments: an object, or a name."""
    for arg in args:
        group: Any = None
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            group = dist.ProcessGroup.unbox(arg)
        elif isinstance(arg, str):
            with contextlib.suppress(Exception):  # names of reductions are strings too
                group = dist.distributed_c10d._resolve_process_group(arg)
        if group is not None:
            return tuple(dist.get_process_group_ranks(group))
    raise AssertionError(f"no process group among {[type(arg) for arg in args]}")


def _same_memory(a: Any, b: Any) -> bool:
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.data_ptr() == b.data_ptr()


def _largest(values: Any) -> int:
    """Bytes of the largest tensor, or list of tensors, found in nested arguments."""
    if isinstance(values, torch.Tensor):
        return values.numel() * values.element_size()
    if isinstance(values, dict):
        values = list(values.values())
    if not isinstance(values, (list, tuple)):
        return 0
    if values and all(isinstance(value, torch.Tensor) for value in values):
        return sum(map(_largest, values))
    return max(map(_largest, values), default=0)
