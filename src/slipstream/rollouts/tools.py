"""The functions that a model may call, the environments that some of them belong to, and running what it calls."""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import get_json_schema

from slipstream.rollouts.event_loop import EventLoop

logger = logging.getLogger(__name__)
NO_TOOLS = ("reset", "get_reward")


@dataclass(slots=True)
class Outcome:
    """What came of one call.

    Attributes:
        name: Of the tool that was called.
        content: What the model is told: what the tool returned as text, or the error.
        failed: Whether the tool raised an error, or there is none of this name.
    """

    name: str
    content: str
    failed: bool = False


class Toolbox:
    """The tools of a run, and one environment for each rollout.

    Args:
        tools: Functions, plain or async, with type hints and docstrings in Google's style.
        environment_factory: Makes an environment: an object with a method `reset`, whose other public methods are
            tools. Environments are kept and reset for later rollouts. None: there are none.

    Attributes:
        schemas: What the model is told about the tools.
        has_environments: Whether there are environments.
        reward: Scores rollouts by their environments' `get_reward`; None where they have none.

    Raises:
        TypeError: what is given is no function, or has no `reset`.
        ValueError: a tool's docstring or type hints are missing, or two tools have the same name.
    """

    def __init__(self, tools: Sequence[Callable[..., Any]] | None, environment_factory: Any = None) -> None:
        if isinstance(environment_factory, dict):
            raise NotImplementedError(
                "environment_factory as a dict, for several kinds of environments in one run, is not there yet: pass "
                "one function that makes one kind."
            )
        if environment_factory is not None and not callable(environment_factory):
            raise TypeError(f"environment_factory={environment_factory!r} is not a function.")
        if tools is not None and not isinstance(tools, list | tuple):
            raise TypeError(f"tools={tools!r} is not a list of functions.")
        self._functions = list(tools or [])
        self._factory = environment_factory
        self._pool: list[Any] = []
        self._loop = EventLoop("tools")
        self._reported: set[str] = set()
        self.has_environments = environment_factory is not None
        self.reward: Callable[..., Any] | None = None
        methods: list[Callable[..., Any]] = []
        if self.has_environments:
            [environment] = self.environments(1)
            if not callable(getattr(environment, "reset", None)):
                raise TypeError(
                    f"environment_factory made a {type(environment).__name__}, which has no method reset: give it one "
                    "that takes the columns of a row, and returns None or a string."
                )
            methods = list(_methods(environment).values())
            self.reward = _own_reward(environment)
        self.schemas = [_schema(function) for function in [*self._functions, *methods]]
        names = [schema["function"]["name"] for schema in self.schemas]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tools: {', '.join(map(repr, twice))} is there twice: give each tool a name of its own.")

    def environments(self, count: int) -> list[Any]:
        """That many environments, always the same ones; they have to be reset."""
        while len(self._pool) < count:
            self._pool.append(self._factory())
        return self._pool[:count]

    def of(self, environment: Any = None) -> dict[str, Callable[..., Any]]:
        """The tools of a rollout by name: those of all, and the methods of its environment."""
        own = {} if environment is None else _methods(environment)
        return {function.__name__: function for function in self._functions} | own

    def run(
        self, batch: Sequence[tuple[dict[str, Callable[..., Any]], Sequence[dict[str, Any]]]]
    ) -> list[list[Outcome]]:
        """Run the calls (`name`, `arguments`) of each rollout, given with its tools.

        Plain functions run one after the other in this thread, rollout after rollout; then all async ones at once.
        """
        waiting: list[tuple[int, int, Any]] = []
        outcomes: list[list[Outcome | None]] = []
        for i, (tools, calls) in enumerate(batch):
            outcomes.append([None] * len(calls))
            for j, call in enumerate(calls):
                name, tool = call["name"], tools.get(call["name"])
                if tool is None:
                    message = f"no tool is named {name!r}; the tools are {', '.join(map(repr, tools))}"
                    outcomes[i][j] = self._failed(name, ValueError(message), "a tool that is not there")
                    continue
                try:
                    # A copy: what a tool does to its arguments must not change the message.
                    returned = tool(**copy.deepcopy(call["arguments"]))
                except Exception as error:  # noqa: BLE001  the model learns from it
                    outcomes[i][j] = self._failed(name, error)
                    continue
                if inspect.isawaitable(returned):
                    waiting.append((i, j, returned))
                else:
                    outcomes[i][j] = Outcome(name, _text(name, returned))
        if waiting:
            for (i, j, _), returned in zip(waiting, self._loop.run(_all([w for *_, w in waiting])), strict=True):
                name = batch[i][1][j]["name"]
                if isinstance(returned, Exception):
                    outcomes[i][j] = self._failed(name, returned)
                elif isinstance(returned, BaseException):
                    raise returned
                else:
                    outcomes[i][j] = Outcome(name, _text(name, returned))
        return [[outcome for outcome in row if outcome is not None] for row in outcomes]

    def _failed(self, name: str, error: Exception, kind: str | None = None) -> Outcome:
        if (kind or name) not in self._reported:
            self._reported.add(kind or name)
            logger.warning(
                "the call of %s failed, which is told to the model and counted in tools/failure_frequency. For each "
                "tool this is said once.", kind or f"the tool {name!r}", exc_info=error,
            )  # fmt: skip
        return Outcome(name, _encodable(str({"error": str(error)})), failed=True)


async def _all(waiting: Sequence[Any]) -> list[Any]:
    return await asyncio.gather(*waiting, return_exceptions=True)


def _methods(environment: Any) -> dict[str, Callable[..., Any]]:
    """The public methods of an environment that are tools. Looked for in its class: properties are not evaluated."""
    found = inspect.getmembers(type(environment), inspect.isfunction)
    return {name: getattr(environment, name) for name, _ in found if not name.startswith("_") and name not in NO_TOOLS}


def _own_reward(environment: Any) -> Callable[..., Any] | None:
    kind = type(environment)
    if not callable(getattr(kind, "get_reward", None)):
        return None
    reward: Callable[..., Any]
    if inspect.iscoroutinefunction(kind.get_reward):

        async def reward(environments: list[Any], **_: Any) -> list[Any]:
            return [await one.get_reward() for one in environments]
    else:

        def reward(environments: list[Any], **_: Any) -> list[Any]:
            return [one.get_reward() for one in environments]

    reward.__name__ = kind.__name__
    return reward


def _schema(function: Any) -> dict[str, Any]:
    if not callable(function) or not hasattr(function, "__name__"):
        raise TypeError(f"tools holds {function!r}: each must be a function with a name, plain or async.")
    try:
        return get_json_schema(function)
    except Exception as error:  # of several kinds, all about the function
        raise ValueError(
            f"tools: the model cannot be told how to call {function.__name__!r} ({error}). Give it type hints and a "
            "docstring in Google's style, with a description and an entry under Args for each argument."
        ) from error


def _text(name: str, returned: Any) -> str:
    blocks = returned if isinstance(returned, list) else []
    if any(isinstance(block, dict) and block.get("type") in ("image", "text", "video", "audio") for block in blocks):
        raise NotImplementedError(
            f"the tool {name!r} returned blocks of content, such as images, which are not there yet: return text."
        )
    return _encodable(str(returned))


def _encodable(text: str) -> str:
    """Half a surrogate pair is no text that a tokenizer can read."""
    return text.encode("utf-8", "replace").decode()
