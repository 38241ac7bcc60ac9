"""The import path that scripts written for TRL use."""

from slipstream.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

__all__ = ["OnlineDPOConfig", "OnlineDPOTrainer"]
