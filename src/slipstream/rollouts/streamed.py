"""Row-wise reward functions at work on finished completions, while the engine samples others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, NoReturn

from slipstream.generation.engine import OnFinished
from slipstream.records import Prompt

Render = Callable[[Sequence[Prompt], Sequence[Sequence[int]]], Sequence[Any]]


@dataclass(slots=True)
class Outcome:
    """What a function has said about some rows.

    Attributes:
        rows: Which of all rows.
        values: A reward each, not yet checked.
        extra: Columns given to `log_extra`, a value each.
        error: What it raised instead.
    """

    rows: list[int]
    values: list[Any] = field(default_factory=list)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    error: Exception | None = None

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Take a column of these rows."""
        if len(values) != len(self.rows):
            raise ValueError(
                f"log_extra({column!r}, ...) was given {len(values)} values for {len(self.rows)} completions."
            )
        self.extra[column] = list(values)


class _Attempt:
    """One time that the engine is asked for the completions of a generation batch."""

    def __init__(self, prompts: Sequence[Prompt], counts: Sequence[int]) -> None:
        self.prompts = prompts
        self.firsts = [sum(counts[:i]) for i in range(len(counts))]
        self.finished: SimpleQueue[tuple[int, list[list[int]]]] = SimpleQueue()
        self.turns: list[Future[None]] = []
        self.outcomes: dict[int, list[Outcome]] = {}


class StreamedRewards:
    """Calls reward functions in one thread, each time with all completions that have been finished since the last time.

    Args:
        functions: Numbers of the row-wise ones.
        call: Given the number of a function, its arguments but for the dataset's columns, the names of these and the
            dataset's rows, returns the list of its rewards.
        render: Makes texts of prompts and token ids.
    """

    def __init__(self, functions: Sequence[int], call: Callable[..., list[Any]], render: Render) -> None:
        self._functions = functions
        self._call = call
        self._render = render
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rewards")
        self._attempt: _Attempt | None = None

    def begin(self, prompts: Sequence[Prompt], counts: Sequence[int]) -> OnFinished:
        """What to call with the number of a prompt and its completions, `counts` of each; forgets those before."""
        attempt = self._attempt = _Attempt(prompts, counts)

        def finished(index: int, completion_ids: list[list[int]]) -> None:
            attempt.finished.put((index, completion_ids))
            attempt.turns.append(self._pool.submit(self._turn, attempt))

        return finished

    def outcome(self, number: int, rows: int) -> Outcome | None:
        """What function `number` says about all `rows` rows; waits for it. None: it has not been called for all.

        Raises:
            Exception: what the function raised.
        """
        attempt = self._attempt
        if attempt is None or number not in self._functions:
            return None
        for turn in attempt.turns:
            turn.result()  # as long as the function takes, as if it were called here
        parts = sorted(attempt.outcomes.get(number, []), key=lambda part: part.rows[0])
        for part in parts:
            if part.error is not None:
                raise part.error
        if sum(len(part.rows) for part in parts) != rows:
            return None
        whole = Outcome(list(range(rows)), [None] * rows)
        for part in parts:
            for row, value in zip(part.rows, part.values, strict=True):
                whole.values[row] = value
            for column, values in part.extra.items():
                target = whole.extra.setdefault(column, [None] * rows)
                for row, value in zip(part.rows, values, strict=True):
                    target[row] = value
        return whole

    def close(self) -> None:
        """Call no function any more; waits for the one that runs."""
        self._pool.shutdown(cancel_futures=True)

    def _turn(self, attempt: _Attempt) -> None:
        groups = sorted(_everything_in(attempt.finished))
        if not groups or attempt is not self._attempt:
            return
        prompts = [attempt.prompts[index] for index, ids in groups for _ in ids]
        completion_ids = [one for _, ids in groups for one in ids]
        rows = [attempt.firsts[index] + i for index, ids in groups for i in range(len(ids))]
        texts = self._render(prompts, completion_ids)
        given = {
            "prompts": [prompt.row["prompt"] for prompt in prompts],
            "completions": list(texts),
            "completion_ids": completion_ids,
            "log_metric": refuse_metric,
        }
        columns = list(attempt.prompts[0].row)
        for number in self._functions:
            outcome = Outcome(rows)
            attempt.outcomes.setdefault(number, []).append(outcome)
            arguments = given | {"log_extra": outcome.log_extra}
            try:
                outcome.values = self._call(number, arguments, columns, [prompt.row for prompt in prompts])
            except Exception as error:  # noqa: BLE001  raised in `outcome`, where the function would be called
                outcome.error = error


def refuse_metric(name: str, value: Any) -> NoReturn:
    """The `log_metric` of row-wise functions: raises ValueError."""
    raise ValueError(
        f"log_metric({name!r}, ...) in a row-wise reward function: what it is given at a time is not fixed, so the "
        "metric would not be either. Use log_extra, or take the mark (slipstream.rewards.rowwise) away."
    )


def _everything_in(queue: SimpleQueue[Any]) -> list[Any]:
    found = []
    while True:
        try:
            found.append(queue.get_nowait())
        except Empty:
            return found
