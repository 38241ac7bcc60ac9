"""A trainer's `state.log_history` read back as series, and the few figures computed from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeGuard

PHASES = ("generate", "score", "train", "sync", "wait")
"""What a step spends its time on, logged in seconds as `time/<phase>`."""

Series = dict[int, float | None]
"""Value by step, in the order of steps; None where a NaN or an infinity was logged."""


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite real number that is no bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def series(history: Iterable[Mapping[str, Any]], metric: str) -> Series:
    """One metric over the steps that logged it, the later of two at a step; empty if no value is finite."""
    found: Series = {}
    for entry in history:
        if metric in entry and isinstance(entry.get("step"), int):
            found[entry["step"]] = float(entry[metric]) if is_number(entry[metric]) else None
    if all(value is None for value in found.values()):
        return {}
    return dict(sorted(found.items()))


def names_between(history: Iterable[Mapping[str, Any]], prefix: str, suffix: str) -> list[str]:
    """What stands between `prefix` and `suffix` in the metrics' names (`rewards/<name>/mean`), as they first appear."""
    found: dict[str, None] = {}
    for entry in history:
        for metric in entry:
            if metric.startswith(prefix) and metric.endswith(suffix) and len(metric) > len(prefix) + len(suffix):
                found[metric[len(prefix) : len(metric) - len(suffix)]] = None
    return list(found)


@dataclass(slots=True)
class Throughput:
    """Tokens a second out of cumulative `num_tokens` and mean `step_time`, entry by entry.

    Attributes:
        step: Step of the last entry that had `num_tokens`; None before the first one.
        tokens: Its `num_tokens`.
    """

    step: int | None = None
    tokens: float = 0.0

    @classmethod
    def resume(cls, history: Sequence[Mapping[str, Any]], step: int) -> Throughput:
        """Where a run that stands at `step` with this log history continues to count."""
        for entry in reversed(history):
            tokens, at = entry.get("num_tokens"), entry.get("step")
            if is_number(tokens) and isinstance(at, int):
                return cls(at, float(tokens))
        return cls(0, 0.0) if step == 0 else cls()

    def rate(self, entry: Mapping[str, Any], step: int) -> float | None:
        """Tokens a second since the entry before; None where it cannot be known."""
        total, seconds = entry.get("num_tokens"), entry.get("step_time")
        if not is_number(total):
            return None
        tokens, steps = float(total) - self.tokens, step - self.step if self.step is not None else 0
        self.step, self.tokens = step, float(total)
        if steps <= 0 or tokens < 0 or not is_number(seconds) or seconds <= 0:
            return None
        return tokens / (float(seconds) * steps)
