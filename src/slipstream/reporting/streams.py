"""Other people's prints, above a live display instead of through it."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


class LinesAbove(io.TextIOBase):
    """A text stream that prints whole lines on a console, where rich puts them above the live display.

    Lines pass as they are, terminal colors included: square brackets are no markup here. A part of a line waits for its
    newline, or for a flush if it is no progress bar (one that returns to the line's start); `finish` prints what waits.

    Args:
        console: Where lines go.
        stream: The stream this stands in for. What this class does not define (`fileno`, `encoding`, …) is asked of it.
    """

    def __init__(self, console: Console, stream: IO[str]) -> None:
        self.rich_proxied_file = stream  # rich's Console looks for this name to find the real file behind sys.stdout
        self._console = console
        self._waiting = ""
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.rich_proxied_file, "encoding", "utf-8")

    def fileno(self) -> int:
        return self.rich_proxied_file.fileno()

    def isatty(self) -> bool:
        return self.rich_proxied_file.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._waiting = (self._waiting + text).split("\n")
        for line in lines:
            self._print(line)
        return len(text)

    def flush(self) -> None:
        if "\r" not in self._waiting:
            self.finish()

    def finish(self) -> None:
        """Print the part of a line that waits for its end."""
        with self._lock:
            rest, self._waiting = self._waiting, ""
        if rest.strip():
            self._print(rest)

    def _print(self, line: str) -> None:
        from rich.text import Text

        # A progress bar draws over itself; only the last of its drawings is a line to keep.
        shown = line.rstrip("\r").rpartition("\r")[2]
        self._console.print(Text.from_ansi(shown), soft_wrap=True)


@contextmanager
def prints_above(console: Console) -> Iterator[None]:
    """Send stdout, stderr and the log handlers that hold either through `console` until the block ends.

    Log handlers keep the stream they were made with, so replacing `sys.stderr` alone would leave them writing into the
    live display.
    """
    streams = {"stdout": sys.stdout, "stderr": sys.stderr}
    stand_ins = {name: LinesAbove(console, stream) for name, stream in streams.items()}
    moved: list[tuple[logging.StreamHandler, IO[str]]] = []
    for handler in _stream_handlers():
        for name, stream in streams.items():
            if handler.stream is stream:
                handler.setStream(stand_ins[name])
                moved.append((handler, stream))
                break
    sys.stdout, sys.stderr = stand_ins["stdout"], stand_ins["stderr"]
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            stand_in.finish()
            if getattr(sys, name) is stand_in:  # someone may have replaced it since; theirs stays
                setattr(sys, name, streams[name])
        for handler, stream in moved:
            handler.setStream(stream)


def _stream_handlers() -> Iterator[logging.StreamHandler]:
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    seen: set[int] = set()
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):  # a PlaceHolder has none
            looks_up = isinstance(getattr(type(handler), "stream", None), property)  # finds sys.stderr anew each time
            if isinstance(handler, logging.StreamHandler) and not looks_up and id(handler) not in seen:
                seen.add(id(handler))
                yield handler
