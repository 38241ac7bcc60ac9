"""The import path that scripts written for TRL use."""

from slipstream.trainers.nash_md import NashMDConfig, NashMDTrainer

__all__ = ["NashMDConfig", "NashMDTrainer"]
