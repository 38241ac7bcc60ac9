"""What can be said about a run before a model is read, to a trainer and to a dry run alike."""

from __future__ import annotations

from typing import Any

from slipstream import vllm_compat
from slipstream.config import OnlineConfig
from slipstream.generation.build import check_sampling
from slipstream.trainers import inputs, sharding, vision
from slipstream.trainers.loop import SlotLoop


def check(
    config: OnlineConfig,
    model: Any,
    train_dataset: Any,
    eval_dataset: Any,
    reward_funcs: Any,
    reward_processing_classes: Any = None,
    judge: Any = None,
    rollout_func: Any = None,
) -> tuple[list[Any], list[Any], bool]:
    """Raise an error that says what to do unless this is a run as far as anybody can tell without its model.

    Returns:
        The reward functions and their tokenizers, as lists of the same length; and whether rows may have images.

    Raises:
        ValueError, NotImplementedError: a dataset, a reward or a setting is wrong, or does not go with another.
        ImportError, RuntimeError: vLLM is to generate in this process, and is missing or of another version.
    """
    inputs.check_rows(config, train_dataset, eval_dataset)
    functions, tokenizers = inputs.reward_lists(reward_funcs, reward_processing_classes, config, judge)
    if train_dataset is not None:
        SlotLoop.make_sampler(config, len(train_dataset))  # complains about too few rows
    if config.use_vllm and config.vllm_mode == "colocate":
        vllm_compat.load()
    check_sampling(config)
    sharding.check(config)
    datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    return functions, tokenizers, vision.check(datasets, model, config, functions, rollout_func)
