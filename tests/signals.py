"""Signals that a script's background jobs, or those under nohup, ignore, and with them all that they start."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """Inside, `handler` is what a signal of this number meets."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
