"""Changing one module and nothing else: its `__class__` becomes a subclass whose methods run on fused ops.

Parameters, buffers, hooks, training mode and attributes stay the very same objects, since the instance's dict is
not written to. Neither the original class nor any other instance sees a difference. The subclass carries the
original's name, and is a pure function of (class, spec): modules changed alike share one, so that compiled code is
shared too, and a pickle holds (class, spec) and not the subclass.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

Methods = dict[str, Callable[..., Any]]


@dataclass(frozen=True)
class Spec:
    """What a module is changed to; hashable and picklable, so every field is a plain value."""

    first_output_only: ClassVar[bool] = False
    """Whether the outputs after the first are left out of the check, being given up on purpose."""

    def methods(self, cls: type[nn.Module]) -> Methods:
        """The methods that replace those of `cls`."""
        raise NotImplementedError


def fused_class(cls: type[nn.Module], spec: Spec) -> type[nn.Module]:
    """Subclass of `cls`, under the same name, with the spec's methods; one for each (cls, spec)."""
    return _fused_class(cls, spec)  # type: ignore[arg-type]


@functools.cache
def _fused_class(cls: type[nn.Module], spec: Spec) -> type[nn.Module]:
    body: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_fused_from": cls,
        "_fused_spec": spec,
    }
    metaclass: Any = type(cls)
    made: type[nn.Module] = metaclass(cls.__name__, (cls,), {**body, **spec.methods(cls)})
    return made


def layers(module: nn.Module) -> tuple[type[nn.Module], tuple[Spec, ...]]:
    """The module's original class, and the specs applied to it, first one first."""
    cls, specs = type(module), []
    while "_fused_spec" in cls.__dict__:
        specs.append(cls.__dict__["_fused_spec"])
        cls = cls.__dict__["_fused_from"]
    return cls, tuple(reversed(specs))


def apply(module: nn.Module, spec: Spec) -> None:
    """Change this module."""
    module.__class__ = fused_class(type(module), spec)


def revert(module: nn.Module, spec: Spec | None = None) -> bool:
    """Give the module its class back (undo one spec, or all of them); False if there was nothing to undo."""
    original, specs = layers(module)
    if not specs or (spec is not None and spec not in specs):
        return False
    kept = [one for one in specs if spec is not None and one != spec]
    module.__class__ = functools.reduce(fused_class, kept, original)
    return True


def _new(cls: type[nn.Module], specs: tuple[Spec, ...]) -> nn.Module:
    made = functools.reduce(fused_class, specs, cls)
    return made.__new__(made)


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    """Pickles and copies name the original class and the specs: the subclass is found under no module's name."""
    original, specs = layers(self)
    made: Any = original.__reduce_ex__(self, protocol)
    function, args, *rest = made
    if function is copyreg.__newobj__:  # type: ignore[attr-defined]
        return (_new, (original, specs), *rest)
    return (function, args, *rest)


def with_original_signature(method: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`method` under the name and signature of `original`: trainers look at argument names."""
    return functools.wraps(original)(method)


def one_input(method: Callable[[Any, Any], Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that gives one positional argument to `method` and leaves every other call to the original."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            result = method(self, args[0])
            if result is not None:
                return result
        return original(self, *args, **kwargs)

    return with_original_signature(forward, original)
