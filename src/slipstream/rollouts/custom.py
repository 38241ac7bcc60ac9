"""Rollouts that a user's function samples in the place of the engine."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch

from slipstream.records import Completion, Prompt

RolloutFunction = Callable[[list[Any], Any], dict[str, Any]]

REQUIRED = ("prompt_ids", "completion_ids", "logprobs")
# Reward functions get these from the trainer.
TAKEN = ("prompt", "prompts", "completion", "completions", "trainer_state", "log_extra", "log_metric")


def sample(
    function: RolloutFunction, trainer: Any, dataset: Any, wanted: Sequence[tuple[int, int, int]], version: int
) -> list[tuple[Prompt, Completion, dict[str, Any]]]:
    """Call `function(prompts, trainer)` with the prompt of each `(row, start, count)`, `count` times each.

    Args:
        function: Returns a dict of lists with one entry a prompt: `prompt_ids`, `completion_ids` and `logprobs` (None
            as a whole: unknown); `env_mask` may mark the policy's own tokens with 1 and all others with 0; what else
            there is becomes columns of the prompts' rows.
        trainer: What the function gets as its second argument.
        dataset: Where the rows are.
        wanted: Which of them.
        version: Of the weights that the function samples with.

    Returns:
        For each completion its prompt (an object of its own, as the row's new columns differ), what was sampled, and
        the `extra` of its rollout: `loss_mask`, if there was an `env_mask`.

    Raises:
        ValueError: a key is missing or taken, or a value has another length or type than described above.
    """
    rows = [(index, dataset[index]) for index, _, count in wanted for _ in range(count)]
    # Copies: a function that adds its turns to the messages must not change those of another completion.
    output = function([copy.deepcopy(row["prompt"]) for _, row in rows], trainer)
    prompts, completions, logprobs, masks, columns = _checked(output, len(rows))
    sampled = []
    for i, (index, row) in enumerate(rows):
        prompt = Prompt(prompts[i], row | {name: values[i] for name, values in columns.items()}, index, rendered=False)
        # Only the function knows why it stopped; nothing here asks.
        completion = Completion(completions[i], None if logprobs is None else logprobs[i], version, "stop")
        extra = {} if masks is None else {"loss_mask": torch.tensor(masks[i], dtype=torch.float32)}
        sampled.append((prompt, completion, extra))
    return sampled


def _checked(output: Any, expected: int) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    if not isinstance(output, dict):
        raise ValueError(
            f"rollout_func returned {type(output).__name__}: it must return a dict with {_names(REQUIRED)}."
        )
    missing = [name for name in REQUIRED if name not in output]
    if missing:
        raise ValueError(
            f"rollout_func returned no {_names(missing)}: it must return a dict with {_names(REQUIRED)} "
            "(logprobs=None where they are unknown)."
        )
    taken = [name for name in TAKEN if name in output]
    if taken:
        raise ValueError(
            f"rollout_func returned {_names(taken)}, which the reward functions get from the trainer: give the column "
            "another name."
        )
    prompts = _token_lists("prompt_ids", output["prompt_ids"], expected)
    completions = _token_lists("completion_ids", output["completion_ids"], expected)
    logprobs = output["logprobs"]
    if logprobs is not None:
        logprobs = _beside("logprobs", logprobs, completions, _logprob)
    masks = output.get("env_mask")
    if masks is not None:
        masks = _beside("env_mask", masks, completions, _zero_or_one)
    columns = {}
    for name, values in output.items():
        if name not in (*REQUIRED, "env_mask"):
            # One value stands for every completion.
            columns[name] = _entries(name, values, expected) if isinstance(values, list) else [values] * expected
    return prompts, completions, logprobs, masks, columns


def _token_lists(name: str, values: Any, expected: int) -> list[list[int]]:
    checked = []
    for i, ids in enumerate(_entries(name, values, expected)):
        ids = _as_list(f"{name}[{i}]", ids)
        if not ids:
            raise ValueError(f"rollout_func returned an empty {name}[{i}]: it must hold at least one token id.")
        for token in ids:
            if not isinstance(token, Integral) or isinstance(token, bool) or token < 0:
                raise ValueError(f"rollout_func returned {token!r} in {name}[{i}]: token ids are integers >= 0.")
        checked.append([int(token) for token in ids])
    return checked


def _beside(name: str, values: Any, completions: list[list[int]], convert: Callable[[str, Any], float]) -> list[Any]:
    """One value for each completion token."""
    checked = []
    for i, (row, ids) in enumerate(zip(_entries(name, values, len(completions)), completions, strict=True)):
        row = _as_list(f"{name}[{i}]", row)
        if len(row) != len(ids):
            raise ValueError(
                f"rollout_func returned {len(row)} values in {name}[{i}] for the {len(ids)} tokens of "
                f"completion_ids[{i}]: there must be one for each."
            )
        checked.append([convert(f"{name}[{i}]", value) for value in row])
    return checked


def _logprob(where: str, value: Any) -> float:
    if value is None:
        return math.nan  # as vLLM says that it could not tell
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(
            f"rollout_func returned {value!r} in {where}: it must be the log-probability of the sampled token, a "
            "number (or None: unknown)."
        )
    return float(value)


def _zero_or_one(where: str, value: Any) -> float:
    if value not in (0, 1):
        raise ValueError(
            f"rollout_func returned {value!r} in {where}: it must be 1 for the policy's own tokens and 0 for others."
        )
    return float(value)


def _entries(name: str, values: Any, expected: int) -> list[Any]:
    values = _as_list(name, values)
    if len(values) != expected:
        raise ValueError(
            f"rollout_func returned {len(values)} entries of {name!r} for {expected} prompts: it must return one for "
            "each (every prompt is given once for each of its completions)."
        )
    return values


def _as_list(name: str, values: Any) -> list[Any]:
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise ValueError(f"rollout_func returned {type(values).__name__} as {name}: it must be a list.")
    return list(values)


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
