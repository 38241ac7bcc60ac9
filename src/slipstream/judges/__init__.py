"""Judges: which of two completions is better, in the place of a reward.

A judgement that fails is no vote: the pair is left out of the loss, and counted.
"""

from __future__ import annotations

from slipstream.judges.base import BaseBinaryJudge, BaseJudge, BasePairwiseJudge, BaseRankJudge
from slipstream.judges.remote import OpenAIPairwiseJudge
from slipstream.judges.reward import RewardFunctionJudge

__all__ = [
    "BaseBinaryJudge",
    "BaseJudge",
    "BasePairwiseJudge",
    "BaseRankJudge",
    "OpenAIPairwiseJudge",
    "RewardFunctionJudge",
]
