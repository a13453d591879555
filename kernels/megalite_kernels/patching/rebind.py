"""Running a class's own methods with other functions in the place of some that they call.

A method finds `F`, `apply_rotary_pos_emb` or `ALL_ATTENTION_FUNCTIONS` in the globals of its module. Here the same
code gets a copy of those globals in which the slow functions are replaced: the module file, its functions and other
instances are not touched, and everything else the method does (projections, caches, norms) stays its own.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Replace = Callable[[str, Any, frozenset[str]], Any]
"""(global's name, its value, all names the method uses) to the value to use instead, or the same value."""


class Namespace:
    """Stands for a module such as torch.nn.functional, with some attributes replaced."""

    def __init__(self, original: types.ModuleType, replaced: dict[str, Any]) -> None:
        self.__dict__.update(vars(original))
        self.__dict__.update(replaced)
        self.__dict__["_original"] = original

    def __getattr__(self, name: str) -> Any:  # what the original makes on first use
        return getattr(self.__dict__["_original"], name)


def torch_namespace(value: Any, names: frozenset[str], replaced: dict[str, Any]) -> Any:
    """`torch`, `torch.nn` or `torch.nn.functional` with functions of the latter replaced; other values as they are."""
    functional = torch.nn.functional
    if not names & set(replaced):
        return value
    if value is functional:
        return Namespace(functional, replaced)
    if value is nn and "functional" in names:
        return Namespace(nn, {"functional": Namespace(functional, replaced)})
    if value is torch and "functional" in names:
        inner = Namespace(nn, {"functional": Namespace(functional, replaced)})
        return Namespace(torch, {"nn": inner})
    return value


def used_names(function: types.FunctionType) -> frozenset[str]:
    """Names of globals and attributes in the function's code, and in that of functions it wraps or makes."""
    names: set[str] = set()
    for one in wrapped(function):
        codes = [one.__code__]
        while codes:
            code = codes.pop()
            names.update(code.co_names)
            codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return frozenset(names)


def wrapped(function: Any) -> Iterator[types.FunctionType]:
    """The function and those that its decorators hide, outermost first."""
    while isinstance(function, types.FunctionType):
        yield function
        function = function.__dict__.get("__wrapped__")


def rebind(function: types.FunctionType, replace: Replace) -> types.FunctionType | None:
    """The function with replaced globals, through its decorators; None if it uses nothing to replace."""
    names = used_names(function)
    changed = {}
    for name in names & set(function.__globals__):
        value = function.__globals__[name]
        new = replace(name, value, names)
        if new is not value:
            changed[name] = new
    inner = function.__dict__.get("__wrapped__")
    new_inner = rebind(inner, replace) if isinstance(inner, types.FunctionType) else None
    if not changed and new_inner is None:
        return None
    scope = {**function.__globals__, **changed}
    # torch.compile looks globals up in the module of this name, and would find the originals there.
    scope.pop("__name__", None)
    cells = function.__closure__ or ()
    if new_inner is not None:
        cells = tuple(types.CellType(new_inner) if _holds(cell, inner) else cell for cell in cells)
    made = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, cells or None
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    if new_inner is not None:
        made.__dict__["__wrapped__"] = new_inner
    made.__doc__, made.__qualname__ = function.__doc__, function.__qualname__
    made.__annotations__ = function.__annotations__
    return made


def _holds(cell: types.CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False


def methods_behind_forward(cls: type[nn.Module]) -> dict[str, types.FunctionType]:
    """The forward, and the plain methods it calls, that a class and its bases up to nn.Module define."""
    defined: dict[str, types.FunctionType] = {}
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType):
                defined.setdefault(name, value)
    found: dict[str, types.FunctionType] = {}
    todo = ["forward"]
    while todo:
        name = todo.pop()
        if name in defined and name not in found:
            found[name] = defined[name]
            todo += used_names(defined[name])
    return found
