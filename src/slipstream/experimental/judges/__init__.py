"""The import path that scripts written for TRL use."""

from __future__ import annotations

from typing import Any

from slipstream.judges import BaseBinaryJudge, BaseJudge, BasePairwiseJudge, BaseRankJudge, OpenAIPairwiseJudge

__all__ = ["BaseBinaryJudge", "BaseJudge", "BasePairwiseJudge", "BaseRankJudge", "OpenAIPairwiseJudge"]

# Judges of TRL's that are not here, and what a script does instead.
_INSTEAD = {
    "PairRMJudge": "Pass a reward model (its name) as `reward_funcs` in the place of `judge`, or write a "
    "BasePairwiseJudge around llm-blender.",
    "HfPairwiseJudge": "OpenAIPairwiseJudge(model=..., base_url=..., api_key=...) asks any service that speaks "
    "OpenAI's protocol, which the Hub's inference providers do.",
    "AllTrueJudge": "No trainer takes a BaseBinaryJudge: a reward function can call several and multiply "
    "their answers.",
}


def __getattr__(name: str) -> Any:
    if name in _INSTEAD:
        # Not an AttributeError: `from ... import` would drop its text.
        raise ImportError(f"{name} is not in slipstream.experimental.judges. {_INSTEAD[name]}", name=__name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(__all__)}")
