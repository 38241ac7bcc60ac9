"""Prompts with images: whether a dataset has them, and whether this model, trainer and engine can take them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from slipstream.config import OnlineConfig
from slipstream.generation.build import model_config
from slipstream.records import Prompt
from slipstream.rollouts.images import has_images, image_columns

# What models call the tokens in whose places they put pictures, films and sounds.
PLACEHOLDERS = tuple(f"{kind}_token_{part}" for kind in ("image", "video", "audio") for part in ("id", "index"))


def is_vision_language(own: Any) -> bool:
    """Whether a model of this configuration takes images."""
    known = getattr(own, "model_type", None) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return known and any(getattr(own, name, None) is not None for name in ("vision_config", "vq_config"))


def loads_with_images(own: Any, images: bool) -> bool:
    """Whether to load the model of a name with the part that sees: where images ask for it, or it is not without."""
    alone = getattr(own, "model_type", None) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return is_vision_language(own) and (images or not alone)


def placeholder_ids(own: Any) -> frozenset[int]:
    """Tokens in whose places a model puts what is not text."""
    found = (getattr(own, name, None) for name in PLACEHOLDERS)
    return frozenset(token for token in found if isinstance(token, int) and token >= 0)


def image_columns_of(dataset: Any) -> list[str]:
    """The columns of a dataset that hold images, or of the first of a dict of datasets that has some."""
    if dataset is None:
        return []
    if isinstance(dataset, dict):
        return next(filter(None, map(image_columns_of, dataset.values())), [])
    return image_columns(dataset[0])


def may_have_images(dataset: Any) -> bool:
    """Whether a dataset has a column of images, or images inside its first prompt."""
    if isinstance(dataset, dict):
        return any(map(may_have_images, dataset.values()))
    return dataset is not None and (bool(image_columns_of(dataset)) or has_images(dataset[0]))


def refuse_beside_tools(*datasets: Any) -> None:
    """Raise NotImplementedError if one of these, which go with tools, has prompts with images."""
    if any(map(may_have_images, datasets)):
        raise NotImplementedError(
            "tools, or environments, and prompts with images in one run are not supported yet: take the images away "
            "(dataset.remove_columns), or leave out tools and environment_factory."
        )


def check(
    datasets: Mapping[str, Any], model: Any, config: OnlineConfig, scorers: Sequence[Any] = (), function: Any = None
) -> bool:
    """Whether rows may have images; an error if they would not be seen, or not in the same way everywhere.

    Args:
        datasets: By what they are called; dicts of several, or None.
        model: A name or the model.
        config: The trainer's.
        scorers: The reward functions.
        function: The rollout_func, or None.

    Raises:
        ValueError: The model takes text alone, or there are two columns.
        NotImplementedError: This cannot be done with images here.
    """
    found = [(name, dataset) for name, dataset in datasets.items() if may_have_images(dataset)]
    for name, dataset in found:
        columns = image_columns_of(dataset)
        if len(columns) > 1:
            raise ValueError(
                f"{name} has columns {columns[0]!r} and {columns[1]!r}, of which the first alone would be "
                "read: remove one (dataset.remove_columns)."
            )
        what = f"{name} has a column {columns[0]!r}" if columns else f"{name} has images in its prompts"
        own = model_config(model, config)
        if not is_vision_language(own):
            instead = f": dataset.remove_columns({columns!r})" if columns else ""
            called = model if isinstance(model, str) else type(model).__name__
            raise ValueError(
                f"{what}, and {called} (a {getattr(own, 'model_type', 'model')}) takes text alone. Pass a "
                f"vision-language model, or take the images away if they are not needed{instead}."
            )
        for why in _obstacles(config, function, scorers):
            raise NotImplementedError(f"{what}, which does not go with {why}")
    return bool(found)


def _obstacles(config: OnlineConfig, rollout_func: Any, scorers: Sequence[Any]) -> Iterator[str]:
    given: Any = config
    if rollout_func is not None:
        yield (
            "rollout_func: it gives token ids, from which it cannot be told where the images are that the model has "
            "to be trained with. Leave one of them out."
        )
    if config.use_vllm and config.samples_from_reference:
        yield "vLLM in a trainer that samples from the reference, where it takes text alone: set use_vllm=False."
    if not config.use_vllm and config.use_transformers_continuous_batching:
        yield "use_transformers_continuous_batching=True, which takes token ids alone: leave it out, or use vLLM."
    if given.fsdp or given.deepspeed or any(map(_is_set, ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))):
        yield (
            "weights that are divided over ranks (FSDP, DeepSpeed): a rank whose rows have no images at the moment "
            "would not wait for the others in the part that sees. Use data parallelism alone."
        )
    if models := [f for f in scorers if isinstance(f, str | nn.Module)]:
        called = models[0] if isinstance(models[0], str) else type(models[0]).__name__
        yield f"the reward model {called}, which would score the text alone: use reward functions."


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "on", "y", "t")


def check_prompt(
    prompt: Prompt, longest: tuple[int, str] | None, config: OnlineConfig, *, expected: bool = True
) -> None:
    """Raise ValueError if a prompt has images that were not expected, or leaves no room for a completion with them.

    Before training only its text was measured: to know how many tokens an image is, it has to be read and processed.
    """
    if prompt.images is None:
        return
    if not expected:
        raise ValueError(
            f"row {prompt.index} of the dataset has images inside its prompt, and the first row has none, by which it "
            "is told whether there are some: move such a row to the front, or give the dataset a column 'images'."
        )
    if longest is None:
        return
    limit, limited_by = longest
    if len(prompt.ids) + config.max_completion_length > limit:
        raise ValueError(
            f"row {prompt.index} of the dataset has {len(prompt.ids)} tokens with its images, and with "
            f"max_completion_length={config.max_completion_length} that is more than {limited_by} of {limit}. Make the "
            "images smaller (or the processor's limit of pixels), lower max_completion_length, or leave the row out: "
            "overlong_prompts='skip' knows the text alone."
        )


def check_padding(pad_token_id: int, placeholders: Iterable[int]) -> None:
    """Raise ValueError if rows would be padded with a token that stands for images."""
    if pad_token_id in placeholders:
        raise ValueError(
            f"the tokenizer's pad_token has the id {pad_token_id}, which is the model's placeholder for images: set "
            "tokenizer.pad_token to another one."
        )
