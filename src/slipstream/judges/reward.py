"""A judge made of a reward function."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from slipstream.judges.base import FAILED, BasePairwiseJudge, Text
from slipstream.records import Completion, Prompt, Rollout


class RewardFunctionJudge(BasePairwiseJudge):
    """Prefers the completion with the higher reward; of equal ones, the first.

    The probability that the first is better is Bradley-Terry's, sigma(first reward - second reward); that of equal ones
    is 1/2, which Online DPO and XPO do not take for a vote. A pair with a completion that the function cannot score
    (None) is not judged.

    Args:
        function: `f(prompts=, completions=, **columns) -> list[float | None]`, as trainers take it, also a coroutine
            function. It cannot read `completion_ids`: a judge is given text.
        timeout: Seconds that a coroutine function may take for one call of `judge`.

    Raises:
        ValueError: the function needs `completion_ids`.
    """

    def __init__(self, function: Callable[..., Any], timeout: float = 600.0) -> None:
        from slipstream.rollouts.rewards import RewardRunner

        if "completion_ids" in inspect.signature(function).parameters:
            raise ValueError(
                f"{function!r} reads completion_ids, and a judge is given text alone: pass it to the trainer as one of "
                "reward_funcs instead."
            )
        self._runner = RewardRunner([function], [None], timeout)

    def judge(  # type: ignore[override]  # what return_scores makes of it is a list of floats
        self,
        prompts: Sequence[Text],
        completions: Sequence[Sequence[Text]],
        shuffle_order: bool = True,
        return_scores: bool = False,
        **columns: Sequence[Any],
    ) -> list[int] | list[float]:
        """See `BasePairwiseJudge`. The order means nothing to a reward.

        Args:
            columns: The dataset's other columns, one value a prompt, for functions that read them.
        """
        pairs = self._rewards(prompts, completions, columns)
        if return_scores:
            return [math.nan if a is None or b is None else _sigmoid(a - b) for a, b in pairs]
        return [FAILED if a is None or b is None else int(b > a) for a, b in pairs]

    def _rewards(
        self, prompts: Sequence[Text], completions: Sequence[Sequence[Text]], columns: dict[str, Sequence[Any]]
    ) -> list[tuple[float | None, float | None]]:
        rollouts = []
        for i, (prompt, pair) in enumerate(zip(prompts, completions, strict=True)):
            row = {"prompt": prompt} | {name: values[i] for name, values in columns.items()}
            for text in pair:
                unknown = Completion([], None, 0, "stop")
                rollouts.append(Rollout(Prompt([], row, i), unknown, text, False))  # type: ignore[arg-type]
        self._runner.score(rollouts)
        rewards = [rollout.rewards[0] for rollout in rollouts]
        return list(zip(rewards[0::2], rewards[1::2], strict=True))


def _sigmoid(x: float) -> float:
    # exp of a large number would overflow.
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
