"""Rollouts in which the model calls tools, sampled turn by turn from the trainer's engine."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType

from slipstream.generation.engine import EngineLostError, Request, Sampling
from slipstream.records import Completion, Prompt
from slipstream.rollouts.images import image_parts
from slipstream.rollouts.prompts import is_conversational
from slipstream.rollouts.sampler import prompt_seed
from slipstream.rollouts.turns import Ask, Episode, play
from slipstream.trainers.sharding import is_sharded

if TYPE_CHECKING:
    from slipstream.trainers.generating import Generating


def converse(
    trainer: Generating, dataset: Any, wanted: Sequence[tuple[int, int, int]], seed: tuple[Any, ...], sampling: Sampling
) -> list[Episode]:
    """Play completions `start ... start + count - 1` of each `(row, start, count)`, in order.

    Seeds follow from the row, the completion's number and the turn, so that neither the number of ranks nor the other
    rollouts have a part in them. Environments are reset at the beginning.

    Raises:
        EngineLostError: the engine was lost, for this rank or another one. All of it has to be done again.
        NotImplementedError: a prompt has images.
        ValueError: a prompt is none that tools can be shown with, or leaves no room for a completion.
    """
    assert trainer.toolbox is not None
    numbered = [(row, start + i) for row, start, count in wanted for i in range(count)]
    prompts, environments = _prompts(trainer, dataset, [row for row, _ in numbered])
    episodes = []
    for (row, number), prompt, environment in zip(numbered, prompts, environments, strict=True):
        if prompt.images is not None or image_parts(prompt.row["prompt"]):
            raise NotImplementedError(
                f"row {row}: tools, or environments, and prompts with images in one run are not supported yet."
            )
        room = sampling.max_tokens
        if trainer.longest is not None:
            limit, limited_by = trainer.longest
            room = min(room, limit - len(prompt.ids))
            if room < 1:
                raise ValueError(
                    f"row {row}: the prompt has {len(prompt.ids)} tokens, which leaves no room for a completion within "
                    f"{limited_by} of {limit}. Shorten what the environment's reset adds to it."
                )
        tools = trainer.toolbox.of(environment)
        episodes.append(Episode(prompt, room, functools.partial(_seed, seed, row, number), tools))
    limit_of_rounds = getattr(trainer.args, "max_tool_calling_iterations", None)
    play(episodes, trainer.dialogue, trainer.toolbox, _asking(trainer, prompts, sampling), limit_of_rounds)
    return episodes


def _seed(seed: tuple[Any, ...], row: int, number: int, turn: int) -> int:
    # The first turn's is that of a run without tools.
    return prompt_seed(*seed, row, *(("turn", turn) if turn else ())) + number


def _prompts(trainer: Generating, dataset: Any, rows: Sequence[int]) -> tuple[list[Prompt], list[Any]]:
    """The prompt and the environment of each rollout; those of a row have one prompt where nothing is added to it."""
    assert trainer.toolbox is not None
    read = functools.cache(lambda index: dataset[index])
    rendered = functools.cache(lambda index: trainer.renderer.render(read(index), index))
    if not trainer.toolbox.has_environments:
        return [rendered(row) for row in rows], [None] * len(rows)
    toolbox, prompts = trainer.toolbox, []
    environments = toolbox.environments([toolbox.kind(read(index)) for index in rows])
    for index, environment in zip(rows, environments, strict=True):
        row = read(index) | {"environments": environment}
        given = {name: value for name, value in read(index).items() if not toolbox.several or name != "environment"}
        observation = environment.reset(**copy.deepcopy(given))
        if observation is None:
            prompts.append(Prompt(rendered(index).ids, row, index))
            continue
        if not isinstance(observation, str):
            raise TypeError(
                f"{type(environment).__name__}.reset returned {type(observation).__name__}: it must return None or a "
                "string, which is added to the last message of the prompt."
            )
        row["prompt"] = _added(row["prompt"], observation)
        ids = trainer.renderer.encode(row["prompt"], f"row {index}", toolbox.schemas_of(row))
        prompts.append(Prompt(ids, row, index, rendered=False))
    return prompts, environments


def _added(prompt: Any, observation: str) -> Any:
    if not is_conversational(prompt):
        raise ValueError(
            f"prompt={prompt!r} is no list of messages, so what reset returned has no place: give prompts as messages."
        )
    content = prompt[-1]["content"]
    more: Any = observation if isinstance(content, str) else [{"type": "text", "text": observation}]
    return [*prompt[:-1], prompt[-1] | {"content": content + more}]


def _asking(trainer: Generating, prompts: Sequence[Prompt], sampling: Sampling) -> Ask:
    """What asks the engine, on all ranks at once: with tensor parallelism their engines compute together."""
    accelerator = trainer.accelerator
    # Ranks that divide the weights they sample with compute equally many rows.
    divided = is_sharded(accelerator) or accelerator.distributed_type == DistributedType.DEEPSPEED
    spare = Request(prompts[0].ids, 1, 0, max_tokens=1)

    def ask(requests: list[Request]) -> list[list[Completion]] | None:
        most = trainer._most_of_all_ranks(len(requests))
        if not most:
            return None
        more = [spare] * (most - len(requests)) if divided and not trainer.args.use_vllm else []
        lost: EngineLostError | None = None
        answers: list[list[Completion]] = []
        try:
            answers = trainer.ask_engine([*requests, *more], sampling)
        except EngineLostError as error:
            lost = error
        # A rank that went on alone would wait for the others for ever.
        if trainer._on_any_rank(lost is not None):
            raise lost or EngineLostError("the engine was lost for another rank")
        return answers[: len(requests)]

    return ask
