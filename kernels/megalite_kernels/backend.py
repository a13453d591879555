"""The one place that picks an implementation for an op, and can say why.

Every op has implementations by backend name. For each call the first name in `PREFERENCE` of the device that
is registered, loads, and supports the arguments is used; `use_backend` forces one name and then nothing else
will do. `explain` lists the choice for every op and why the others were passed over.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "sdpa", "reference"),
    "cuda": ("triton", "cuda", "sdpa", "reference"),
    "default": ("reference",),
}
"""Backend names by device type, best first; "default" serves every other device."""

Supports = Callable[..., "str | None"]


@dataclass(slots=True)
class Implementation:
    """One way to run an op: where its function is, what it takes."""

    target: Callable[..., Any] | str
    """The function, or "package.module:name" to import on first use."""
    requires: str | None = None
    """Module that must import for this backend to exist."""
    supports: Supports | None = None
    """Called with the op's arguments: None, or the reason why they can't be handled."""
    failure: str | None = field(default=None, init=False)

    def load(self) -> Callable[..., Any] | None:
        """The function, or None with the reason kept in `failure`."""
        if not isinstance(self.target, str) or self.failure is not None:
            return None if self.failure is not None else self.target  # type: ignore[return-value]
        try:
            if self.requires is not None:
                importlib.import_module(self.requires)
            module, name = self.target.split(":")
            self.target = getattr(importlib.import_module(module), name)
        except ImportError as error:
            self.failure = f"{self.requires or self.target} does not import: {error}"
            return None
        return self.target  # type: ignore[return-value]


_implementations: dict[str, dict[str, Implementation]] = {}
# A plain value and no ContextVar: autograd's threads, which run the backwards, don't inherit a context.
_forced: list[tuple[str, ...]] = []
_records: list[list[Choice]] = []


def register(
    op: str, backend: str, function: Callable[..., Any], *, supports: Supports | None = None
) -> None:
    """Make `function` the implementation of `op` on `backend`."""
    _implementations.setdefault(op, {})[backend] = Implementation(function, supports=supports)


def register_lazy(
    op: str, backend: str, target: str, *, requires: str | None = None, supports: Supports | None = None
) -> None:
    """As `register`, with "package.module:function" imported on first use, if module `requires` imports."""
    _implementations.setdefault(op, {})[backend] = Implementation(target, requires, supports)


def order(device: str) -> tuple[str, ...]:
    """Backend names to try on a device type, best first: the forced ones, else `PREFERENCE`."""
    return _forced[-1] if _forced else PREFERENCE.get(device, PREFERENCE["default"])


def choose(op: str, device: str, args: tuple[Any, ...] | None = None) -> Callable[..., Any]:
    """The function that runs `op` for these arguments on a device type.

    Raises:
        ValueError: a backend is forced that this op lacks, that doesn't load, or doesn't take the arguments.
    """
    reasons: dict[str, str] = {}
    for name in order(device):
        function = _usable(op, name, args, reasons)
        if function is not None:
            for record in _records:
                record.append(Choice(op, name, reasons))
            return function
    there = ", ".join(n for n, i in _implementations[op].items() if i.load() is not None)
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"no backend for {op} on {device} ({why}). Backends of this op here: {there}")


def _usable(
    op: str, name: str, args: tuple[Any, ...] | None, reasons: dict[str, str]
) -> Callable[..., Any] | None:
    implementation = _implementations[op].get(name)
    if implementation is None:
        reasons[name] = "not implemented for this op"
        return None
    function = implementation.load()
    if function is None:
        reasons[name] = implementation.failure or "does not load"
        return None
    if args is not None and implementation.supports is not None:
        reason = implementation.supports(*args)
        if reason is not None:
            reasons[name] = reason
            return None
    return function


def dispatch(op: str) -> Callable[..., Any]:
    """The function behind a registered op: chooses a backend at every call, so a compiled graph follows it.

    The first argument of every op is a tensor, or a list of them, on the device that matters.
    """

    def call(*args: Any) -> Any:
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        device = first.device.type
        return choose(op, device, args)(*args)

    call.__name__ = op
    return call


@contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Run every op inside the `with` block on backend `names[0]`, or the next name that can; else raise.

    Process-wide, so that backward passes on autograd's own threads follow it too.

    Raises:
        ValueError: no name, or one that no op has a backend of.
    """
    known = sorted({backend for by_name in _implementations.values() for backend in by_name})
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        what = f"backend {unknown[0]!r} is not known" if unknown else "no backend is named"
        raise ValueError(f"{what}: use one of {', '.join(known)}")
    _forced.append(names)
    try:
        yield
    finally:
        _forced.pop()


@dataclass(frozen=True, slots=True)
class Choice:
    """What an op runs on, and why not on the backends that come before it."""

    op: str
    backend: str
    passed_over: dict[str, str]


@contextmanager
def recording() -> Iterator[list[Choice]]:
    """Collects the choice made for each raw op that is called inside the `with` block, in order."""
    record: list[Choice] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)


class Explanation(tuple[Choice, ...]):
    """The choices of all ops; prints as a table."""

    def __str__(self) -> str:
        lines = [f"{'op':<32} {'backend':<10} passed over"]
        for choice in self:
            reasons = "; ".join(f"{name}: {why}" for name, why in choice.passed_over.items())
            lines.append(f"{choice.op:<32} {choice.backend:<10} {reasons}".rstrip())
        return "\n".join(lines)


def explain(device: str = "cpu") -> Explanation:
    """Which backend each op would take on a device type, before looking at a call's dtypes and options."""
    choices = []
    for op in sorted(_implementations):
        reasons: dict[str, str] = {}
        chosen = next((n for n in order(device) if _usable(op, n, None, reasons) is not None), "none")
        relevant = {n: why for n, why in reasons.items() if n in _implementations[op]}
        choices.append(Choice(op, chosen, relevant))
    return Explanation(choices)
