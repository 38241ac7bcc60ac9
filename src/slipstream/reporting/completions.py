"""Completions for people: rows of a JSON-lines log that survives a kill, and a console table of some of them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .text import number, shorten, visible

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class CompletionRow:
    """One completion as the log, the console table and the report show it.

    Attributes:
        step: Optimizer step it was used or evaluated at.
        prompt: The prompt as text.
        completion: The completion as text.
        rewards: Reward by function name; None where the function could not score it.
        advantage: Its advantage (0.0 in evaluation).
        length: Completion length in tokens.
        truncated: True if it stopped at the token limit and not at an end of sequence.
        weight_version: Version of the weights that sampled it.
        mode: "train" or "eval".

    Raises:
        ValueError: A field has a type or value it cannot have.
    """

    step: int
    prompt: str
    completion: str
    rewards: dict[str, float | None]
    advantage: float
    length: int
    truncated: bool
    weight_version: int
    mode: Literal["train", "eval"] = "train"

    def __post_init__(self) -> None:
        if self.mode not in ("train", "eval"):
            raise ValueError(f"mode is {self.mode!r}; it must be 'train' or 'eval'.")
        for name in ("prompt", "completion"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is a {type(getattr(self, name)).__name__}; render it to a string first.")
        for name in ("step", "length", "weight_version"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be an integer.")
        if not isinstance(self.rewards, dict):
            raise ValueError(f"rewards is a {type(self.rewards).__name__}; it must be a dict of name to value.")


class CompletionLog:
    """Completions of a run as JSON lines, one row a line, appended as the run goes.

    A process killed while it writes leaves at most a torn last line. That line is dropped, with a warning, by the next
    `read`, `append` or `truncate_after`; any other damage is an error, because it is not ours to guess at.
    Numbers that JSON lacks are written as Python writes them (`NaN`, `Infinity`). One process writes a log.

    Args:
        path: The file, by convention `completions.jsonl` in the output directory. It need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._end_checked = False

    def append(self, rows: Iterable[CompletionRow]) -> None:
        """Write rows at the end of the log, in one write."""
        data = b"".join(_encode(row) for row in rows)
        if not data:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._end_checked:
            self._mend_end()
        with self.path.open("ab") as file:
            file.write(data)

    def read(self) -> list[CompletionRow]:
        """All rows in the order they were written; an empty list if there is no log yet.

        Raises:
            ValueError: A line other than a torn last one is not a completion row.
        """
        return [row for _, row in self._lines()]

    def truncate_after(self, step: int) -> int:
        """Drop the rows of steps after `step`, so that a resumed run does not log them twice.

        A run that starts over in the same directory calls `truncate_after(-1)`. The log is replaced in one move: a kill
        leaves either the old or the new one.

        Returns:
            How many rows were dropped.

        Raises:
            ValueError: A line other than a torn last one is not a completion row.
        """
        if not self.path.exists():
            return 0
        lines = list(self._lines())
        kept = [line for line, row in lines if row.step <= step]
        scratch = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        scratch.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(scratch, self.path)
        self._end_checked = True
        return len(lines) - len(kept)

    def _lines(self) -> Iterator[tuple[bytes, CompletionRow]]:
        """Each line, without its newline, and the row in it."""
        if not self.path.exists():
            return
        *lines, last = self.path.read_bytes().split(b"\n")  # never by splitlines(): text may hold other line breaks
        for position, line in enumerate(lines, start=1):
            try:
                row = _decode(line)
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {position}: not a completion row ({error}). A killed run can only leave a last "
                    f"line without its newline. Repair or remove this line, or move the file away to start a new log."
                ) from error
            yield line, row
        if last:
            try:
                yield last, _decode(last)
            except (ValueError, TypeError):
                logger.warning("%s: dropped its last line of %d bytes, torn by a killed run.", self.path, len(last))

    def _mend_end(self) -> None:
        """Make the file end after a whole line, so that the next one does not continue a torn one."""
        self._end_checked = True
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            last = file.read().rpartition(b"\n")[2]
            if not last:
                return
            try:
                _decode(last)
            except (ValueError, TypeError):
                file.seek(-len(last), os.SEEK_END)
                file.truncate()
                logger.warning("%s: dropped its last line of %d bytes, torn by a killed run.", self.path, len(last))
            else:
                file.write(b"\n")


def _encode(row: CompletionRow) -> bytes:
    try:
        return (json.dumps(asdict(row), ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a lone surrogate, which UTF-8 cannot hold and a JSON escape can
        return (json.dumps(asdict(row)) + "\n").encode()


def _decode(line: bytes) -> CompletionRow:
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got a {type(values).__name__}")
    known = {field.name for field in fields(CompletionRow)}  # a later version's extra fields are left alone
    return CompletionRow(**{name: value for name, value in values.items() if name in known})


def completions_table(
    rows: Sequence[CompletionRow], step: int, *, prompt_chars: int = 240, completion_chars: int = 480
) -> Table:
    """A table of `rows` with prompt, completion, one column a reward, and advantage.

    Rows of one prompt that follow each other show the prompt once. Text is cut in the middle, newlines show as `↵`, and
    nothing in a prompt, a completion or a reward's name can style the table or act on the terminal.

    Args:
        rows: The rows to show, all of them: the caller samples.
        step: Optimizer step for the title.
        prompt_chars: Longest prompt shown, in characters.
        completion_chars: Longest completion shown, in characters.

    Returns:
        A renderable for `rich.console.Console.print`.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def text(value: str, limit: int, style: str = "") -> Text:
        shown = Text(visible(shorten(value, limit)), style=style)
        shown.highlight_regex("[↵⇥]", "dim cyan")
        return shown

    def heading(name: str) -> Text:
        lines = [""]  # rich breaks at spaces alone; a reward's name breaks after an underscore
        for part in visible(name).replace("_", "_\0").split("\0"):
            lines[-1:] = [lines[-1] + part] if len(lines[-1] + part) <= 14 else [lines[-1], part]
        return Text("\n".join(line for line in lines if line))

    def value(score: float | None, colored: bool = False) -> Text:
        style = "" if score is not None and score == score else "dim"
        if colored and not style and score:
            style = "green" if score > 0 else "red"
        return Text(number(score), style=style)

    names = list(dict.fromkeys(name for row in rows for name in row.rewards))
    table = Table(title=Text(f"Completions at step {step}"), box=box.ROUNDED, header_style="bold", border_style="dim")
    table.add_column(heading("Prompt"), ratio=2, overflow="fold")
    table.add_column(heading("Completion"), ratio=3, overflow="fold")
    for name in names:
        table.add_column(heading(name), justify="right", overflow="fold", min_width=6)
    table.add_column(heading("Advantage"), justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        repeated = i > 0 and rows[i - 1].prompt == row.prompt
        ends_group = i + 1 == len(rows) or rows[i + 1].prompt != row.prompt
        cells: list[Any] = [
            text("" if repeated else row.prompt, prompt_chars, style="dim"),
            text(row.completion, completion_chars),
            *(value(row.rewards.get(name)) for name in names),
            value(row.advantage, colored=True),
        ]
        table.add_row(*cells, end_section=ends_group)
    return table
