"""Slipstream: online reinforcement learning of language models, with vLLM doing the generating.

Names are loaded when they are first used, so that importing the package costs nothing and needs neither torch nor vLLM.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from slipstream.version import __version__

if TYPE_CHECKING:
    from slipstream.serving.client import VLLMClient
    from slipstream.trainers.grpo import GRPOConfig, GRPOTrainer
    from slipstream.trainers.nash_md import NashMDConfig, NashMDTrainer
    from slipstream.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
    from slipstream.trainers.rloo import RLOOConfig, RLOOTrainer
    from slipstream.trainers.xpo import XPOConfig, XPOTrainer

_EXPORTS = {
    "GRPOConfig": "slipstream.trainers.grpo",
    "GRPOTrainer": "slipstream.trainers.grpo",
    "NashMDConfig": "slipstream.trainers.nash_md",
    "NashMDTrainer": "slipstream.trainers.nash_md",
    "OnlineDPOConfig": "slipstream.trainers.online_dpo",
    "OnlineDPOTrainer": "slipstream.trainers.online_dpo",
    "RLOOConfig": "slipstream.trainers.rloo",
    "RLOOTrainer": "slipstream.trainers.rloo",
    "VLLMClient": "slipstream.serving.client",
    "XPOConfig": "slipstream.trainers.xpo",
    "XPOTrainer": "slipstream.trainers.xpo",
}

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "NashMDConfig",
    "NashMDTrainer",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "VLLMClient",
    "XPOConfig",
    "XPOTrainer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        known = sorted({*__all__, "rewards", "judges"})
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
        # `from slipstream import ...` asks here first, also for modules, and would replace an AttributeError's text.
        if sys._getframe(1).f_code.co_name == "_handle_fromlist" and not importlib.util.find_spec(f"{__name__}.{name}"):
            raise ImportError(f"cannot import name {name!r} from {__name__!r}; {hint}", name=__name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; {hint}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
