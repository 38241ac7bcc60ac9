"""A judge in the place of reward functions: checked, and asked about the pairs of a generation batch."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object

from slipstream.judges import BasePairwiseJudge
from slipstream.records import Rollout
from slipstream.trainers.pairwise_config import PairwiseConfig

logger = logging.getLogger(__name__)
EQUALS = (
    "eval_temperature=0.0 gives a prompt the same completion twice, and a judge of the two can say nothing: leave "
    "eval_temperature None, or evaluate with reward_funcs."
)


def checked_judge(judge: Any, reward_funcs: Any, config: PairwiseConfig) -> BasePairwiseJudge | None:
    """`judge`; None where `reward_funcs` score.

    Raises:
        ValueError, TypeError: neither is given, or both; it cannot compare two completions; or a penalty is to be taken
            from scores, of which it gives none.
    """
    if (judge is None) == (reward_funcs is None):
        given = "neither is" if judge is None else "both are"
        raise ValueError(f"either reward_funcs or judge must be given, and {given}: pass one of them.")
    if judge is None:
        return None
    if not isinstance(judge, BasePairwiseJudge):
        raise TypeError(
            f"judge={judge!r} is not a slipstream.judges.BasePairwiseJudge, which compares two completions."
        )
    if config.missing_eos_penalty is not None:
        raise ValueError(
            f"missing_eos_penalty={config.missing_eos_penalty} is taken from scores, and a judge gives none: use "
            "reward_funcs, or leave it None."
        )
    return judge


def probabilities(judge: BasePairwiseJudge, rollouts: Sequence[Rollout], real: int) -> list[float]:
    """The probability that the first of every two rollouts is better; NaN: not judged.

    Only about the first `real` rollouts is the judge asked: the others do not count, and judgements cost. Why some
    failed is written to the main process's log. All ranks call it together.
    """
    pairs = list(zip(rollouts[0:real:2], rollouts[1:real:2], strict=True))
    answers: list[float] = []
    if pairs:
        rows = [first.prompt.row for first, _ in pairs]
        answers = judge.probabilities(
            [row["prompt"] for row in rows],
            [(first.text, second.text) for first, second in pairs],
            columns={name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"},
        )
    reasons: Counter[str] = sum((Counter(taken) for taken in gather_object([judge.take_failures()])), Counter())
    if reasons:
        described = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        logger.warning("%d judgements failed, and their pairs are left out: %s", reasons.total(), described)
    return answers + [math.nan] * (len(rollouts) // 2 - len(answers))
