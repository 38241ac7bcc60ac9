"""What a judge is."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

# A prompt or a completion, as the dataset has it: a string, or a list of messages.
Text = str | Sequence[dict[str, Any]]
FAILED = -1


class BaseJudge(ABC):
    """Compares or checks completions. Subclasses implement `judge`."""

    @abstractmethod
    def judge(self, prompts: Sequence[Text], completions: Sequence[Any], shuffle_order: bool = True) -> list[Any]:
        """One judgement a prompt.

        Args:
            prompts: The prompts.
            completions: What is judged for each of them.
            shuffle_order: Show a prompt's completions in random order, so that a preference for a place evens out. What
                is returned is in the order that was given.
        """

    def take_failures(self) -> dict[str, int]:
        """How many judgements have failed since this was last asked, by reason; nothing where it is not counted."""
        return {}


class BaseRankJudge(BaseJudge):
    """Sorts the completions of a prompt."""

    @abstractmethod
    def judge(
        self, prompts: Sequence[Text], completions: Sequence[Sequence[Text]], shuffle_order: bool = True
    ) -> list[list[int]]:
        """For each prompt the numbers of its completions, from the best to the worst: [1, 2, 0] says that the second is
        the best and the first the worst. See `BaseJudge` for the arguments."""


class BasePairwiseJudge(BaseJudge):
    """Says which of two completions is better.

    Attributes:
        both_orders: Whether `probabilities` asks about each pair twice, in either order, unless it is told otherwise.
    """

    both_orders = False

    @abstractmethod
    def judge(
        self, prompts: Sequence[Text], completions: Sequence[Sequence[Text]], shuffle_order: bool = True
    ) -> list[int]:
        """For each prompt 0 if the first of its two completions is better, 1 if the second is, -1 if the judgement
        failed. See `BaseJudge` for the arguments.

        A judge that knows more than that takes one more argument, `return_scores=False`; with True it returns the
        probability that the first completion is better, NaN if the judgement failed. One that takes any argument
        (`**columns`) is also given the other columns of the dataset, one value a prompt.
        """

    def probabilities(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Sequence[Text]],
        both_orders: bool | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> list[float]:
        """For each prompt the probability that the first of its two completions is better; NaN: not judged.

        A judge without probabilities of its own votes: 1.0 or 0.0.

        Args:
            both_orders: Ask twice, in either order, and return the mean; both judgements must succeed. None: as the
                judge's attribute says.
            columns: The dataset's other columns, one value a prompt, for a judge that reads them.

        Raises:
            ValueError: the judge returned something else than what it should.
        """
        columns = columns or {}
        if self.both_orders if both_orders is None else both_orders:
            swapped = [(second, first) for first, second in completions]
            doubled = {name: [*values, *values] for name, values in columns.items()}
            answers = self._judged([*prompts, *prompts], [*completions, *swapped], doubled, shuffle_order=False)
            there, back = answers[: len(prompts)], answers[len(prompts) :]
            return [(p + 1 - q) / 2 for p, q in zip(there, back, strict=True)]
        return self._judged(prompts, completions, columns, shuffle_order=True)

    def _judged(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Sequence[Text]],
        columns: Mapping[str, Sequence[Any]],
        shuffle_order: bool,
    ) -> list[float]:
        parameters = inspect.signature(self.judge).parameters
        scores = "return_scores" in parameters
        options: dict[str, Any] = {"shuffle_order": shuffle_order} | ({"return_scores": True} if scores else {})
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            options = {name: values for name, values in columns.items() if name not in parameters} | options
        answers = self.judge(prompts, completions, **options)
        name = type(self).__name__
        if len(answers) != len(prompts):
            raise ValueError(f"{name} returned {len(answers)} judgements for {len(prompts)} pairs.")
        probabilities = []
        for i, answer in enumerate(answers):
            probability = float(answer) if scores else {0: 1.0, 1: 0.0, FAILED: math.nan}.get(answer, math.inf)
            if not (math.isnan(probability) or 0 <= probability <= 1):
                allowed = "a probability (NaN: not judged)" if scores else "0, 1 or -1 (not judged)"
                raise ValueError(f"{name} returned {answer!r} for pair {i}: it must be {allowed}.")
            probabilities.append(probability)
        return probabilities


class BaseBinaryJudge(BaseJudge):
    """Says of each completion alone whether it is right."""

    @abstractmethod
    def judge(  # type: ignore[override]  # the order of arguments that scripts know
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        gold_completions: Sequence[Text] | None = None,
        shuffle_order: bool = True,
    ) -> list[int]:
        """For each prompt 1 if its completion is right, 0 if it is not, -1 if the judgement failed.

        Args:
            prompts: The prompts.
            completions: One a prompt.
            gold_completions: Completions that are right, one a prompt, to compare with.
            shuffle_order: Judge in random order, for a judge whose answers depend on what it was asked before.
        """


def as_text(text: Text) -> str:
    """A prompt or completion as people read it: a string as it is, a single message's content, or several messages each
    with its role before it."""
    if isinstance(text, str):
        return text
    contents = [_content(message) for message in text]
    if len(contents) == 1:
        return contents[0]
    return "\n\n".join(f"{message['role']}: {content}" for message, content in zip(text, contents, strict=True))


def _content(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())
