"""Values that may change from one epoch to the next."""

from __future__ import annotations

from typing import Any

from slipstream.checks import number


def checked(field: str, value: Any, **bounds: Any) -> Any:
    """`value`, a number or a list of one an epoch, with a list of one number as that number.

    Args:
        field: Its name, for the message.
        value: What was given.
        bounds: As of `checks.number`.

    Raises:
        ValueError: an empty list, or a number out of bounds.
    """
    if not isinstance(value, list | tuple):
        number(field, value, **bounds)
        return value
    if not value:
        raise ValueError(f"{field}=[] is not allowed: it must be a number, or a list with one for each epoch.")
    for i, one in enumerate(value):
        number(f"{field}[{i}]", one, **bounds)
    return list(value) if len(value) > 1 else value[0]


def present(value: float | list[float], epoch: int) -> float:
    """The value of an epoch (0 is the first); the last of a list stays."""
    if not isinstance(value, list):
        return value
    return value[min(epoch, len(value) - 1)]


def highest(value: float | list[float]) -> float:
    """The largest value of any epoch."""
    return max(value) if isinstance(value, list) else value
