"""What a person sees of a run: the progress bar, tables of completions, and the HTML report.

Names load on first use, so importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .completions import CompletionLog, CompletionRow, completions_table
    from .progress import ProgressReporter
    from .report import write_report

_HOMES = {
    "CompletionLog": "completions",
    "CompletionRow": "completions",
    "completions_table": "completions",
    "ProgressReporter": "progress",
    "write_report": "report",
}

__all__ = ["CompletionLog", "CompletionRow", "ProgressReporter", "completions_table", "write_report"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
