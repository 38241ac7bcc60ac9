"""Running reward functions over rollouts."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn

from slipstream.records import Rollout
from slipstream.rollouts.event_loop import EventLoop
from slipstream.rollouts.images import COLUMNS as IMAGES
from slipstream.rollouts.reward_models import score_with_model
from slipstream.rollouts.streamed import Render, StreamedRewards, refuse_metric

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]
OWN_ARGUMENTS = {
    "prompt", "completion", "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
}  # fmt: skip


class RewardRunner:
    """Scores rollouts with every reward function.

    A reward function is called as `f(prompts=, completions=, completion_ids=, **columns, trainer_state=, log_extra=,
    log_metric=)`, where `columns` are the dataset's other columns (`image` and `images` where these are parameters of
    its own), and returns one number (or None: cannot be scored) a completion. The lists are its own: it may change
    them. Coroutine functions run concurrently, always in the same event loop; those marked as row-wise
    (`slipstream.rewards.rowwise`) while the engine samples, see `streamed`. A sequence-classification model is a reward
    function too: its reward is logit 0 of prompt and completion.

    Args:
        functions: Functions, or sequence-classification models.
        tokenizers: For each model the tokenizer of its own; None for functions.
        timeout: Seconds that the asynchronous functions may take together for one batch.
        loop: Runs these; None: one of its own.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction | nn.Module],
        tokenizers: Sequence[Any | None],
        timeout: float = 600.0,
        loop: EventLoop | None = None,
    ) -> None:
        self.functions = list(functions)
        self.tokenizers = list(tokenizers)
        self.timeout = timeout
        self.names = reward_names(self.functions)
        self._loop = EventLoop("rewards") if loop is None else loop
        self._told_of_unscored = False

    @contextlib.contextmanager
    def streamed(self, render: Render, trainer_state: Any = None) -> Iterator[StreamedRewards | None]:
        """For the time of one generation batch: what calls the row-wise functions on completions that are finished.

        Yields None where no function is row-wise.
        """
        functions = {i: f for i, f in enumerate(self.functions) if _is_rowwise(f)}
        if not functions:
            yield None
            return

        def call(number: int, given: dict[str, Any], columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> Any:
            arguments = given | {"trainer_state": trainer_state} | _columns(rows, columns)
            return _as_list(
                self.names[number], self.functions[number](**_own(self.functions[number], arguments)), len(rows)
            )

        streamed = StreamedRewards(list(functions), call, render)
        try:
            yield streamed
        finally:
            streamed.close()

    def score(
        self,
        rollouts: Sequence[Rollout],
        trainer_state: Any = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        streamed: StreamedRewards | None = None,
    ) -> None:
        """Fill `rewards` of every rollout, one value a function; `streamed` has begun with some functions.

        Raises:
            ValueError: a function returned another number of values, or something that is neither a finite number
                nor None.
            TimeoutError: the asynchronous functions were not done in time.
        """
        if not rollouts:
            return
        arguments = {
            "prompts": [r.prompt.row["prompt"] for r in rollouts],
            "completions": [r.text for r in rollouts],
            "completion_ids": [r.completion.ids for r in rollouts],
            "trainer_state": trainer_state,
            "log_extra": log_extra or (lambda column, values: None),
            "log_metric": log_metric or (lambda name, value: None),
        }
        arguments |= _columns([r.prompt.row for r in rollouts], list(rollouts[0].prompt.row))
        values: list[Any] = [None] * len(self.functions)
        waiting: dict[int, Any] = {}
        for i, function in enumerate(self.functions):
            if isinstance(function, nn.Module):
                values[i] = score_with_model(function, self.tokenizers[i], rollouts)
            elif _is_async(function):
                waiting[i] = function
            elif streamed is not None and (outcome := streamed.outcome(i, len(rollouts))) is not None:
                values[i] = outcome.values
                for column, logged in outcome.extra.items():
                    arguments["log_extra"](column, logged)
            else:
                own = {"log_metric": refuse_metric} if _is_rowwise(function) else {}
                values[i] = function(**_own(function, arguments) | own)
        if waiting:
            for i, result in zip(waiting, self._run_async(list(waiting.values()), arguments), strict=True):
                values[i] = result
        columns = [_checked(name, v, len(rollouts)) for name, v in zip(self.names, values, strict=True)]
        for i, rollout in enumerate(rollouts):
            rollout.rewards = [column[i] for column in columns]
        unscored = sum(all(value is None for value in rollout.rewards) for rollout in rollouts)
        if unscored and columns and not self._told_of_unscored:
            self._told_of_unscored = True
            logger.warning(
                "%d of %d completions were scored None by every reward function (%s): nothing is learnt from them. "
                "This is said once.",
                unscored, len(rollouts), ", ".join(self.names),
            )  # fmt: skip

    def _run_async(self, functions: list[Any], arguments: dict[str, Any]) -> list[Any]:
        async def all_of_them() -> list[Any]:
            deadline = asyncio.timeout(self.timeout)
            tasks: list[asyncio.Task[Any]] = []
            try:
                async with deadline:
                    for function in functions:
                        tasks.append(asyncio.ensure_future(function(**_own(function, arguments))))
                    return await asyncio.gather(*tasks)
            except TimeoutError as error:
                if not deadline.expired():
                    raise  # one of the functions' own
                names = ", ".join(_name(f) for f in functions)
                raise TimeoutError(
                    f"the asynchronous reward functions ({names}) were not done after reward_timeout={self.timeout} "
                    "seconds: raise reward_timeout, or give their requests a shorter one."
                ) from error
            finally:
                # Those that are left when one has failed would wait in the loop for the next batch.
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        return self._loop.run(all_of_them())


def reward_names(functions: Sequence[Any]) -> list[str]:
    """What the entries of `reward_funcs` are called in metrics.

    Raises:
        TypeError: one is neither callable nor the name of a model.
        ValueError: two have the same name.
    """
    for function in functions:
        if not callable(function) and not isinstance(function, str):
            raise TypeError(
                f"reward_funcs holds {function!r}: each must be a function, a coroutine function, a model, or its name."
            )
    names = [_name(function) for function in functions]
    duplicates = {name for name in names if names.count(name) > 1}
    if duplicates:
        raise ValueError(
            f"two reward functions have the same name {sorted(duplicates)}: their metrics would be mixed up. Give "
            "each its own __name__."
        )
    return names


def _name(function: Any) -> str:
    if isinstance(function, nn.Module | str):
        path = function if isinstance(function, str) else str(function.config._name_or_path)  # type: ignore[union-attr]
        return path.rstrip("/").split("/")[-1] or type(function).__name__
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _is_async(function: Any) -> bool:
    while hasattr(function, "func"):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _is_rowwise(function: Any) -> bool:
    if isinstance(function, nn.Module) or _is_async(function):
        return False
    while hasattr(function, "func"):
        function = function.func
    # functools.wraps copies the mark to a function that may do more with a batch.
    copied = getattr(getattr(function, "__wrapped__", None), "rowwise", False)
    return getattr(function, "rowwise", False) is True and not copied


def _columns(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, list[Any]]:
    """The dataset's columns for reward functions: those that are not their own arguments."""
    return {name: [row.get(name) for row in rows] for name in names if name not in OWN_ARGUMENTS}


def _own(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one function: what it changes is neither another's, nor what is learnt from, nor the dataset's.

    Completions of a prompt have the same prompt object. What columns hold is not copied: it may be large.
    """
    left_out = [name for name in IMAGES if name in arguments and name not in _parameters(function)]
    given = {name: value for name, value in arguments.items() if name not in left_out}
    own = {name: list(value) if isinstance(value, list) else value for name, value in given.items()}
    copies = {name: [copy.deepcopy(one) for one in own[name]] for name in ("prompts", "completions")}
    return own | copies | {"completion_ids": [list(ids) for ids in own["completion_ids"]]}


def _parameters(function: Any) -> set[str]:
    """Those that a function names, which what `**columns` takes is not."""
    try:
        return set(inspect.signature(function).parameters)
    except ValueError:  # something built in, which tells nothing
        return set()


def _as_list(name: str, values: Any, expected: int) -> list[Any]:
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise ValueError(
            f"reward function {name!r} returned {type(values).__name__}: it must return a list with one number or "
            "None a completion."
        )
    if len(values) != expected:
        raise ValueError(f"reward function {name!r} returned {len(values)} values for {expected} completions.")
    return list(values)


def _checked(name: str, values: Any, expected: int) -> list[float | None]:
    values = _as_list(name, values, expected)
    checked: list[float | None] = []
    for i, value in enumerate(values):
        if value is None:
            checked.append(None)
            continue
        if hasattr(value, "item"):
            value = value.item()
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(
                f"reward function {name!r} returned {value!r} for completion {i}: it must be a finite number, or None "
                "if the completion cannot be scored."
            )
        checked.append(float(value))
    return checked
