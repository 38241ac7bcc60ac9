"""The functions that a model may call, the environments that some of them belong to, and running what it calls."""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import get_json_schema

from slipstream.rollouts.event_loop import EventLoop

logger = logging.getLogger(__name__)
NO_TOOLS = ("reset", "get_reward")
CONTENT = ("image", "text", "video", "audio")
"""Kinds of blocks that a message may consist of."""

ONLY = None
"""The kind of the environments of a run that has but one."""


@dataclass(slots=True)
class Outcome:
    """What came of one call.

    Attributes:
        name: Of the tool that was called.
        content: What the model is told: what the tool returned as text, or the error.
        failed: Whether the tool raised an error, returned what cannot be written, or is not there.
    """

    name: str
    content: str
    failed: bool = False


class Toolbox:
    """The tools of a run, and one environment for each rollout.

    Args:
        tools: Functions, plain or async, with type hints and docstrings in Google's style.
        environment_factory: Makes an environment: an object with a method `reset`, whose other public methods are
            tools. Or a dict of several such functions: a row's column `environment` chooses one. Environments are kept
            and reset for later rollouts. None: there are none.

    Attributes:
        schemas: What models are told about the tools, all of them.
        has_environments: Whether there are environments.
        loop: Runs async tools.
        rewards: Score rollouts by their environments' `get_reward`: a function a class that has it.

    Raises:
        TypeError: what is given is no function, or has no `reset`, or an async one.
        ValueError: a tool's docstring or type hints are missing, or two tools have the same name.
    """

    def __init__(self, tools: Sequence[Callable[..., Any]] | None, environment_factory: Any = None) -> None:
        if tools is not None and not isinstance(tools, list | tuple):
            raise TypeError(f"tools={tools!r} is not a list of functions.")
        self._functions = list(tools or [])
        self.several = isinstance(environment_factory, dict)
        if self.several and not environment_factory:
            raise ValueError("environment_factory={} names no environment: give functions by the rows' environment.")
        self._factories: dict[Any, Any] = environment_factory if self.several else {ONLY: environment_factory}
        if environment_factory is None:
            self._factories = {}
        for factory in self._factories.values():
            if not callable(factory):
                raise TypeError(f"environment_factory={factory!r} is not a function.")
        self._pools: dict[Any, list[Any]] = {kind: [] for kind in self._factories}
        self.loop = EventLoop("tools")
        self._reported: set[str] = set()
        self.has_environments = bool(self._factories)
        common = [_schema(function) for function in self._functions]
        self._schemas: dict[Any, list[dict[str, Any]]] = {}
        classes: list[type] = []
        for kind in self._factories:
            [environment] = self.environments([kind])
            if not callable(getattr(environment, "reset", None)):
                raise TypeError(
                    f"environment_factory made a {type(environment).__name__}, which has no method reset: give it one "
                    "that takes the columns of a row, and returns None or a string."
                )
            if inspect.iscoroutinefunction(environment.reset):
                raise TypeError(
                    f"{type(environment).__name__}.reset is async, and nothing awaits it: make it a plain method. "
                    "Tools and get_reward may be async."
                )
            self._schemas[kind] = common + [_schema(method) for method in _methods(environment).values()]
            if type(environment) not in classes:
                classes.append(type(environment))
        if not self.has_environments:
            self._schemas[ONLY] = common
        for schemas in self._schemas.values():
            names = [schema["function"]["name"] for schema in schemas]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(
                    f"tools: {', '.join(map(repr, twice))} is there twice: give each tool a name of its own."
                )
        self.schemas = [schema for schemas in self._schemas.values() for schema in schemas]
        self.rewards = [reward for reward in map(_own_reward, classes) if reward is not None]

    def kind(self, row: dict[str, Any]) -> Any:
        """Which environment a row of the dataset is for.

        Raises:
            ValueError: there are several, and the row's column `environment` names none of them.
        """
        if not self.several:
            return ONLY
        kind = row.get("environment")
        if kind not in self._factories:
            raise ValueError(
                f"a row of the dataset has environment={kind!r}, which is not one of those in environment_factory: "
                f"{', '.join(map(repr, self._factories))}."
            )
        return kind

    def schemas_of(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """What the model is told about the tools that it has for a row."""
        return self._schemas[self.kind(row)]

    def environments(self, kinds: Sequence[Any]) -> list[Any]:
        """An environment of each of these kinds, always the same ones; they have to be reset."""
        made, taken = [], Counter[Any]()
        for kind in kinds:
            pool = self._pools[kind]
            if taken[kind] == len(pool):
                pool.append(self._factories[kind]())
            made.append(pool[taken[kind]])
            taken[kind] += 1
        return made

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
                    outcomes[i][j] = self._told(name, returned)
        if waiting:
            for (i, j, _), returned in zip(waiting, self.loop.run(_all([w for *_, w in waiting])), strict=True):
                name = batch[i][1][j]["name"]
                if isinstance(returned, Exception):
                    outcomes[i][j] = self._failed(name, returned)
                elif isinstance(returned, BaseException):
                    raise returned
                else:
                    outcomes[i][j] = self._told(name, returned)
        return [[outcome for outcome in row if outcome is not None] for row in outcomes]

    def _told(self, name: str, returned: Any) -> Outcome:
        """What the model is told of a call that has returned."""
        blocks = returned if isinstance(returned, list) else []
        if any(isinstance(block, dict) and block.get("type") in CONTENT for block in blocks):
            raise NotImplementedError(
                f"the tool {name!r} returned blocks of content, such as images, which are not there yet: return text."
            )
        try:
            return Outcome(name, _encodable(str(returned)))
        except Exception as error:  # noqa: BLE001  an object that cannot be written is a call that failed
            return self._failed(name, error)

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


def _own_reward(kind: Any) -> Callable[..., Any] | None:
    """A reward function of what `get_reward` of this class says; None for others' rollouts, or if there is none."""
    get: Any = getattr(kind, "get_reward", None)
    if not callable(get):
        return None
    reward: Callable[..., Any]
    if inspect.iscoroutinefunction(get):

        async def reward(environments: list[Any], **_: Any) -> list[Any]:
            return [await one.get_reward() if type(one) is kind else None for one in environments]
    else:

        def reward(environments: list[Any], **_: Any) -> list[Any]:
            return [one.get_reward() if type(one) is kind else None for one in environments]

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


def _encodable(text: str) -> str:
    """Half a surrogate pair is no text that a tokenizer can read."""
    return text.encode("utf-8", "replace").decode()
