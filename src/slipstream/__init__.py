"""Slipstream: online reinforcement learning of language models, with vLLM doing the generating.

Names are loaded when they are first used, so that importing the package costs nothing and needs neither torch nor vLLM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from slipstream.version import __version__

if TYPE_CHECKING:
    from slipstream.trainers.grpo import GRPOConfig, GRPOTrainer

_EXPORTS = {
    "GRPOConfig": "slipstream.trainers.grpo",
    "GRPOTrainer": "slipstream.trainers.grpo",
}

__all__ = ["GRPOConfig", "GRPOTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(sorted(__all__))}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
