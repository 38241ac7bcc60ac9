"""The two sides: Slipstream's trainer and TRL's, led through one optimizer step on the same rows and weights.

Each samples (a table in the place of an engine), scores, annotates and learns with its own code; what is handed to them
is what users can hand to them: a model folder, reward functions, a configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import slipstream
from slipstream.generation.engine import Request, Sampling, SyncReport
from slipstream.records import Completion
from slipstream.rollouts.sampler import Slot

# Of one length: to pad prompts on the left, as TRL does, moves positions, and that alone costs four times the rounding.
EVEN = ("a=1, b=?", "What is?", "The rest")
RAGGED = ("a=1, b=?", "What?", "The rest of it")
LONGEST = 12
WEIGHTS = [1.0, 0.5]


@dataclass
class Scene:
    """What both sides are given.

    Attributes:
        folder: Of the model; its weights are the reference's.
        sampling, learning: The weights when sampling, and when learning.
        completions: Token ids of every row; those of a prompt stand together.
        sampler_logps: What the engine reports for them, or None.
        rewards: Of each of the two reward functions, for every row.
        prompts: One a group of rows.
        group: Rows of a prompt.
    """

    folder: Path
    tokenizer: Any
    sampling: dict[str, Tensor]
    learning: dict[str, Tensor]
    completions: list[list[int]]
    sampler_logps: list[list[float]] | None
    rewards: list[list[float | None]]
    prompts: tuple[str, ...]
    group: int

    @property
    def dataset(self) -> Dataset:
        return Dataset.from_dict({"prompt": list(self.prompts)})

    @property
    def reward_functions(self) -> list[Callable[..., list[float | None]]]:
        def first(**_: Any) -> list[float | None]:
            return self.rewards[0]

        def second(**_: Any) -> list[float | None]:
            return self.rewards[1]

        return [first, second]


@dataclass
class Result:
    """What a side says: the loss, the gradient of every parameter, the advantage of every row where rows have one."""

    loss: float
    gradients: dict[str, Tensor]
    advantages: Tensor | None = None


def make_scene(
    folder: Path,
    tokenizer: Any,
    rewards: list[list[float | None]],
    seed: int,
    prompts: tuple[str, ...],
    group: int,
) -> Scene:
    """Random rows and weights. The policy moves far enough between sampling and learning for ratios to be clipped."""
    draw = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)

    def move(by: float) -> dict[str, Tensor]:
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=by)
        return {name: value.clone() for name, value in model.state_dict().items()}

    completions = []
    for row in range(group * len(prompts)):
        length = 1 if row == 6 else int(torch.randint(2, LONGEST, (), generator=draw))
        ids = torch.randint(5, 100, (length,), generator=draw).tolist()
        # Some rows end, the others were cut off.
        completions.append(ids + [tokenizer.eos_token_id] * (row % 3 != 0))
    return Scene(folder, tokenizer, move(0.02), move(0.02), completions, None, rewards, prompts, group)


def sampler_logps(scene: Scene, temperature: float, unknown: bool, seed: int = 1) -> list[list[float]]:
    """Log-probabilities near those of the sampling weights; two rows are off by more, so that bounds are met."""
    draw = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(scene.folder, dtype=torch.float32)
    model.load_state_dict(scene.sampling)
    rows = []
    for row, ids in enumerate(scene.completions):
        prompt = scene.tokenizer(scene.prompts[row // scene.group])["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
        logps = logits.log_softmax(-1).gather(-1, torch.tensor(ids).unsqueeze(-1)).squeeze(-1)
        shift = {5: 0.4, 9: -0.4}.get(row, 0.0)
        rows.append((logps + shift + 0.1 * torch.randn(logps.shape, generator=draw)).tolist())
    if unknown:
        rows[5][0], rows[9] = math.nan, [math.nan] * len(rows[9])
    return rows


# Fields of every configuration: one micro-batch a step.
COMMON: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False,
    "gradient_accumulation_steps": 1, "model_init_kwargs": {"dtype": "float32"}, "reward_weights": WEIGHTS,
    "use_vllm": False,
}  # fmt: skip
OUR_OWN = {"html_report": False, "log_completions": False}


def group_settings(scene: Scene, settings: dict[str, Any], on_policy: bool) -> dict[str, Any]:
    """Fields that configurations of GRPO and RLOO have in both."""
    return {
        **COMMON, "shuffle_dataset": False, "num_generations": scene.group, "max_completion_length": LONGEST,
        "per_device_train_batch_size": len(scene.completions), "num_iterations": 1 if on_policy else 2, **settings,
    }  # fmt: skip


class Table:
    """An engine that answers with the rows of a scene."""

    version: int | None = None

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: object = None
    ) -> list[list[Completion]]:
        assert [r.n for r in requests] == [self.scene.group] * len(self.scene.prompts)
        logps = self.scene.sampler_logps
        flat = [
            Completion(ids, None if logps is None else logps[row], self.version or 0, "length")
            for row, ids in enumerate(self.scene.completions)
        ]
        return [flat[i : i + self.scene.group] for i in range(0, len(flat), self.scene.group)]

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> SyncReport:
        self.version = version
        return SyncReport(version, 0, 0, 0.0)

    def close(self) -> None: ...


def our_step(trainer: Any, scene: Scene, learning: dict[str, Tensor]) -> Result:
    """Sample, score and learn with one of our trainers, with other weights when it learns."""
    trainer.engine.close()
    trainer.engine = Table(scene)
    trainer.model.load_state_dict(scene.sampling)
    trainer.model.train()
    rollouts = trainer._sample_batch(Slot(0, 0, 0))
    advantages = torch.tensor([r.advantage for r in rollouts])
    trainer.model.load_state_dict(learning)
    loss, _ = trainer._learn(trainer.model_wrapped, rollouts)
    return Result(loss.item(), gradients(trainer.model), advantages)


def ours(
    trainer_class: Any, config_class: Any, scene: Scene, folder: Path, settings: dict[str, Any], on_policy: bool
) -> Result:
    """One step of our GRPO or RLOO."""
    config = config_class(str(folder), **group_settings(scene, settings, on_policy), **OUR_OWN)
    trainer = trainer_class(
        str(scene.folder), scene.reward_functions, config, scene.dataset, processing_class=scene.tokenizer
    )
    return our_step(trainer, scene, scene.sampling if on_policy else scene.learning)


def theirs(
    trainer_class: Any, config_class: Any, scene: Scene, folder: Path, settings: dict[str, Any], on_policy: bool
) -> Result:
    """One step of TRL's GRPO or RLOO."""

    def rows(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [scene.tokenizer(prompt)["input_ids"] for prompt in prompts]
        logps: Any = scene.sampler_logps
        if logps is not None:
            # TRL's engine reports an unknown log-probability as None.
            logps = [[None if math.isnan(v) else v for v in values] for values in logps]
        return {"prompt_ids": ids, "completion_ids": scene.completions, "logprobs": logps}

    # Only GRPO has a way to replace the engine.
    takes_rows = trainer_class is trl.GRPOTrainer
    trainer = trainer_class(
        str(scene.folder), scene.reward_functions,
        config_class(str(folder), **group_settings(scene, settings, on_policy)),
        scene.dataset, processing_class=scene.tokenizer, **({"rollout_func": rows} if takes_rows else {}),
    )  # fmt: skip
    if not takes_rows:
        trainer._generate_single_turn = lambda *_: scene.completions
    if scene.sampler_logps is not None:
        # As if vLLM had sampled and had the weights already; the constructor would want a vLLM.
        trainer.use_vllm, trainer._last_loaded_step = True, 0
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.load_state_dict(scene.sampling)
    trainer.model.train()
    inputs = [{"prompt": prompt} for prompt in scene.prompts for _ in range(scene.group)]
    batch = trainer._generate_and_score_completions(inputs)
    trainer.model.load_state_dict(scene.sampling if on_policy else scene.learning)
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return Result(loss.item(), gradients(trainer.model), batch["advantages"])


def pair_settings(scene: Scene, settings: dict[str, Any]) -> dict[str, Any]:
    """Fields that configurations of Online DPO have in both; batches count prompts."""
    return {**COMMON, "per_device_train_batch_size": len(scene.prompts), "max_new_tokens": LONGEST, **settings}


def our_pairs(scene: Scene, folder: Path, settings: dict[str, Any]) -> Result:
    """One step of our Online DPO."""
    config = slipstream.OnlineDPOConfig(str(folder), **pair_settings(scene, settings), **OUR_OWN, shuffle_dataset=False)
    trainer = slipstream.OnlineDPOTrainer(
        model=str(scene.folder), reward_funcs=scene.reward_functions, args=config, train_dataset=scene.dataset,
        processing_class=scene.tokenizer,
    )  # fmt: skip
    result = our_step(trainer, scene, scene.sampling)
    return Result(result.loss, result.gradients)


def their_pairs(scene: Scene, folder: Path, settings: dict[str, Any]) -> Result:
    """One step of TRL's Online DPO, which has the first completions of all prompts before the second ones."""
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    order = [*range(0, len(scene.completions), 2), *range(1, len(scene.completions), 2)]

    def reordered(function: Any) -> Any:
        def reward(**columns: Any) -> list[Any]:
            values = function(**columns)
            return [values[row] for row in order]

        return reward

    trainer: Any = OnlineDPOTrainer(
        AutoModelForCausalLM.from_pretrained(scene.folder, dtype=torch.float32),
        reward_funcs=[reordered(function) for function in scene.reward_functions],
        args=OnlineDPOConfig(str(folder), **{**pair_settings(scene, settings), "model_init_kwargs": None}),
        train_dataset=scene.dataset, processing_class=scene.tokenizer,
    )  # fmt: skip
    pad = scene.tokenizer.pad_token_id

    def rows(model: nn.Module, prompts: list[str], images: Any = None) -> tuple[Any, ...]:
        ids = [scene.tokenizer(prompt)["input_ids"] for prompt in prompts] * 2
        completions = [scene.completions[row] for row in order]
        return *padded(ids, pad, left=True), *padded(completions, pad, left=False), None

    trainer._generate = rows
    trainer.model.load_state_dict(scene.sampling)
    loss = trainer.training_step(trainer.model, {"prompt": list(scene.prompts)})
    return Result(loss.item(), gradients(trainer.model))


def padded(rows: list[list[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids of one length, and a mask of those that are real."""
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    ids = [[pad] * gap + row if left else row + [pad] * gap for row, gap in zip(rows, gaps, strict=True)]
    mask = [
        [0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap for row, gap in zip(rows, gaps, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
