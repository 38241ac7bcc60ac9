"""The import path that scripts written for TRL use."""

from slipstream.trainers.xpo import XPOConfig, XPOTrainer

__all__ = ["XPOConfig", "XPOTrainer"]
