"""Checks that the configuration's dataclasses share; each raises `UserError` naming the field and its value."""

from __future__ import annotations

from megalite.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition`."""
    if not condition:
        raise UserError(message)


def positive(owner: object, *names: str) -> None:
    """Each named field of `owner` is greater than 0."""
    for name in names:
        value = getattr(owner, name)
        require(value > 0, f"{label(owner)}.{name}={value} must be greater than 0")


def require_divides(name: str, degree: int, size: int, what: str) -> None:
    """`parallel.<name>` divides `size`; the message gives the nearest degrees that do."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    lower, upper = (
        max(d for d in divisors if d <= degree),
        min((d for d in divisors if d >= degree), default=size),
    )
    require(
        size % degree == 0,
        f"parallel.{name}={degree} must divide {what}={size}: the nearest that do are {lower} and {upper}",
    )


def not_negative(owner: object, *names: str) -> None:
    """Each named field of `owner` is at least 0."""
    for name in names:
        value = getattr(owner, name)
        require(value >= 0, f"{label(owner)}.{name}={value} must not be negative")


def label(owner: object) -> str:
    """Name of the table of a configuration dataclass."""
    return type(owner).__name__.removesuffix("Config").lower() or "config"
