"""Rollouts in a form that `torch.load(weights_only=True)` reads: numbers, strings, containers, tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from slipstream.records import Completion, Prompt, Rollout


def pack(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Every field of `rollouts`, but not the rows of their prompts: these are read from the dataset again."""
    rows = []
    # A rollout function may give the completions of one row different prompts.
    numbers: dict[tuple[int, bool, tuple[int, ...]], int] = {}
    for rollout in rollouts:
        prompt = rollout.prompt
        number = numbers.setdefault((prompt.index, prompt.rendered, tuple(prompt.ids)), len(numbers))
        completion = _fields(rollout.completion)
        # As tensors, which load much faster than lists.
        completion["ids"] = torch.tensor(rollout.completion.ids, dtype=torch.int64)
        if rollout.completion.logprobs is not None:
            completion["logprobs"] = torch.tensor(rollout.completion.logprobs, dtype=torch.float64)
        rows.append(_fields(rollout) | {"prompt": number, "completion": completion})
    extras = [(name, value) for rollout in rollouts for name, value in rollout.extra.items()]
    return {
        "prompts": [(index, rendered, list(ids)) for index, rendered, ids in numbers],
        "rows": rows,
        "on_device": sorted({name for name, value in extras if isinstance(value, Tensor) and not value.is_cpu}),
    }


def unpack(packed: dict[str, Any], prompt: Callable[[int], Prompt], device: torch.device) -> list[Rollout]:
    """The rollouts that `pack` was given.

    Args:
        packed: What it returned.
        prompt: Reads a row of the dataset, and renders it unless a rollout function does that.
        device: Where tensors go that were not on the CPU.

    Raises:
        ValueError: a row does not have the prompt that was sampled from.
    """
    prompts = []
    for index, rendered, ids in packed["prompts"]:
        present = prompt(index)
        if rendered and present.rendered and present.ids != ids:
            raise ValueError(
                f"row {index} of train_dataset has another prompt than the one that the saved completions answer: the "
                "rows, their order, the tokenizer or the chat template have changed. Bring back what the run had."
            )
        prompts.append(replace(present, ids=ids, rendered=rendered))
    rollouts = []
    for row in packed["rows"]:
        completion, extra = dict(row["completion"]), dict(row["extra"])
        for name in ("ids", "logprobs"):
            completion[name] = None if completion[name] is None else completion[name].tolist()
        for name in set(packed["on_device"]) & set(extra):
            extra[name] = extra[name].to(device)
        known = {"prompt": prompts[row["prompt"]], "completion": Completion(**completion), "extra": extra}
        rollouts.append(Rollout(**row | known))
    return rollouts


def plain(value: Any, name: str) -> Any:
    """`value` with its tensors copied to the CPU and numpy's numbers as Python's.

    Raises:
        TypeError: a part of it can only be loaded by running code; `name` says which in the message.
    """
    if isinstance(value, Tensor):
        # A copy: a view would bring the whole tensor that it is a part of.
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {plain(k, name): plain(v, f"{name}[{k!r}]") for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(v, name) for v in value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if hasattr(value, "item"):
        return plain(value.item(), name)
    raise TypeError(
        f"{name} holds a {type(value).__name__}, which cannot be kept in a checkpoint: use numbers, strings, lists, "
        "dicts and tensors."
    )


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}
