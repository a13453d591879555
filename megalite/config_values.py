"""Nested plain values (of a TOML file, a checkpoint's manifest) to configuration dataclasses and back."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal, TypeVar

from megalite.errors import UserError

T = TypeVar("T")


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build a configuration dataclass from nested plain values.

    Raises:
        UserError: an unknown key (with the nearest known one) or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{where}.{key}" if where else key
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(known))}"
            raise UserError(f"unknown key {dotted!r}{hint}")
        arguments[key] = _convert(hints[key], value, dotted)
    try:
        return cls(**arguments)
    except TypeError as error:
        raise UserError(f"{where or 'configuration'}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of a configuration; fields that are None are left out (TOML has no null)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
            return {name: plain(item) for name, item in items if item is not None}
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        return value

    return plain(config)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` checked against, and converted to, the annotated type `hint`."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        _expect(isinstance(value, dict), where, value, "a table")
        return from_dict(typing.cast(Any, hint), value, where)
    if origin is tuple:
        _expect(isinstance(value, (list, tuple)), where, value, "a list")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        _expect(value in arguments, where, value, "one of " + ", ".join(map(repr, arguments)))
        return value
    if hint is float:
        _expect(isinstance(value, (int, float)) and not isinstance(value, bool), where, value, "a number")
        return float(value)
    if hint is bool:
        _expect(isinstance(value, bool), where, value, "true or false")
        return value
    if hint is int:
        _expect(isinstance(value, int) and not isinstance(value, bool), where, value, "a whole number")
        return value
    _expect(isinstance(value, hint), where, value, f"a {hint.__name__}")
    return value


def _expect(condition: bool, where: str, value: Any, wanted: str) -> None:
    if not condition:
        raise UserError(f"{where}={value!r} must be {wanted}")
