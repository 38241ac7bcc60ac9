"""Rollouts of several turns: the model calls tools, is told their results, and goes on.

What it sampled is kept token by token; what stands between its turns has a loss mask of 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from slipstream.generation.engine import Request
from slipstream.records import Completion, Prompt
from slipstream.rollouts.dialogue import Dialogue, assistant, result
from slipstream.rollouts.tools import Toolbox

# Asks for one completion a request. Every rank calls it equally often; None: none of them has a request left.
Ask = Callable[[list[Request]], list[list[Completion]] | None]


@dataclass(slots=True)
class Episode:
    """One rollout on its way.

    Attributes:
        prompt: What it begins with.
        room: Tokens that all its turns and the results in between may have together.
        seed: Gives the seed of a turn, by its number.
        tools: What it may call, by name.
        messages: Its turns, and the results in between.
        parts: What was sampled, one a turn.
        ids, mask, logprobs: Of all tokens after the prompt; 0.0 and NaN stand at those that were not sampled.
        calls: Of the last turn, if they are to be answered.
        called: How many calls were answered.
        failed: How many of them failed.
    """

    prompt: Prompt
    room: int
    seed: Callable[[int], int]
    tools: dict[str, Callable[..., Any]]
    messages: list[dict[str, Any]] = field(default_factory=list)
    parts: list[Completion] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    mask: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    called: int = 0
    failed: int = 0

    def request(self) -> Request:
        """Ask for its next turn."""
        return Request([*self.prompt.ids, *self.ids], 1, self.seed(len(self.parts)), max_tokens=self._left)

    def take(self, part: Completion, dialogue: Dialogue | None) -> None:
        """Add a turn that was sampled. One that was cut off calls nothing: its last call may be half of one."""
        before = [*self.prompt.ids, *self.ids]
        self._add(part.ids, 1.0, part.logprobs)
        self.parts.append(part)
        if dialogue is None:
            return
        if part.finish_reason == "length":
            message, self.calls = assistant(dialogue.text(part.ids)), []
        else:
            message, self.calls = dialogue.read(part.ids, before)
        self.messages.append(message)

    def answer(self, outcomes: Sequence[Any], dialogue: Dialogue) -> bool:
        """Add the results of its calls, if there is room for them and for a token after them; says whether."""
        self.called += len(outcomes)
        self.failed += sum(outcome.failed for outcome in outcomes)
        results = [result(outcome.name, outcome.content) for outcome in outcomes]
        between = dialogue.after(self.parts[-1].ids, self.calls, results)
        if len(between) >= self._left:
            return False
        self._add(between, 0.0, None)
        self.messages += results
        return True

    def completion(self) -> Completion:
        """All of it, as if it were sampled in one go."""
        known = all(part.logprobs is not None for part in self.parts)
        first, last = self.parts[0], self.parts[-1]
        return Completion(self.ids, self.logprobs if known else None, first.weight_version, last.finish_reason)

    def extra(self) -> dict[str, Any]:
        """What training needs to know about it besides."""
        return {"loss_mask": torch.tensor(self.mask), "tool_calls": self.called, "tool_failures": self.failed}

    @property
    def _left(self) -> int:
        return self.room - len(self.ids)

    def _add(self, ids: Sequence[int], mask: float, logprobs: Sequence[float] | None) -> None:
        self.ids += ids
        self.mask += [mask] * len(ids)
        self.logprobs += [math.nan] * len(ids) if logprobs is None else logprobs


def play(
    episodes: Sequence[Episode], dialogue: Dialogue | None, toolbox: Toolbox, ask: Ask, most_rounds: int | None = None
) -> None:
    """Let all episodes go on, a turn of each at a time, until none calls a tool or all have reached a limit.

    Args:
        episodes: They are changed.
        dialogue: Reads turns and writes what follows them; None where there is no tool to call.
        toolbox: Runs what is called.
        ask: Samples.
        most_rounds: How often an episode's calls are answered at most; None: always.
    """
    live = list(episodes)
    while (answers := ask([episode.request() for episode in live])) is not None:
        for episode, [part] in zip(live, answers, strict=True):
            episode.take(part, dialogue)
        calling = [e for e in live if e.calls and (most_rounds is None or len(e.parts) <= most_rounds)]
        outcomes = toolbox.run([(episode.tools, episode.calls) for episode in calling])
        live = []
        for episode, row in zip(calling, outcomes, strict=True):
            assert dialogue is not None  # nothing calls without it
            if episode.answer(row, dialogue):
                live.append(episode)
