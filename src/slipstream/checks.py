"""Checks of values that people type: each error names the field, the value, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def one_of(field: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ValueError unless `value` is in `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        close = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{field}={value!r} is not one of {', '.join(map(repr, allowed))}.{hint}")


def number(
    field: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    integer: bool = False,
) -> None:
    """Raise ValueError unless `value` is a finite number (not a bool) within the given bounds."""
    kind = "an integer" if integer else "a number"
    bounds = [
        text
        for limit, text in ((least, f">= {least}"), (above, f"> {above}"), (most, f"<= {most}"))
        if limit is not None
    ]
    allowed = f"{kind} {' and '.join(bounds)}".rstrip()
    right_type = isinstance(value, int if integer else int | float) and not isinstance(value, bool)
    if (
        not right_type
        or value != value
        or value in (float("inf"), float("-inf"))
        or (least is not None and value < least)
        or (above is not None and value <= above)
        or (most is not None and value > most)
    ):
        raise ValueError(f"{field}={value!r} is not allowed: it must be {allowed}.")


def known_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError naming every unknown name in `given`, each with the closest known one."""
    known = list(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        parts = []
        for name in unknown:
            close = difflib.get_close_matches(name, known, n=1)
            parts.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
        raise ValueError(f"unknown {what}: {', '.join(parts)}.")
