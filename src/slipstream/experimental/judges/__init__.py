"""The import path that scripts written for TRL use."""

from slipstream.judges import BaseBinaryJudge, BaseJudge, BasePairwiseJudge, BaseRankJudge, OpenAIPairwiseJudge

__all__ = ["BaseBinaryJudge", "BaseJudge", "BasePairwiseJudge", "BaseRankJudge", "OpenAIPairwiseJudge"]
