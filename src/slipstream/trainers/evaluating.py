"""Evaluation: completions for all rows of a dataset in one go, scored as in training."""

from __future__ import annotations

import math
from typing import Any

from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from slipstream.trainers import inputs, sharding, vision
from slipstream.trainers.generating import Generating
from slipstream.trainers.metrics import Tally


class Evaluating(Generating):
    """The part of a trainer that evaluates.

    Attributes:
        rewards_are_binary: Whether the last evaluation's rewards (of the first function, on all ranks) were all 0 and
            1: right and wrong answers.
    """

    rewards_are_binary = False

    def _expect_images(self, dataset: Any) -> None:
        """Images may come with a dataset that the constructor was not given."""
        if self.toolbox is not None:
            vision.refuse_beside_tools(dataset)
        model = self.accelerator.unwrap_model(self.model_wrapped)
        if vision.check({"eval_dataset": dataset}, model, self.args, self._scorers, self.rollout_func):
            if self.renderer.processor is None:
                raise ValueError(
                    "eval_dataset has images, and the trainer has no processor for them: pass processing_class, what "
                    "AutoProcessor.from_pretrained returns."
                )
            vision.check_padding(self.packer.pad_token_id, self.packer.placeholders)
            self.packer.expect_images()

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Sample completions for every row in one go, score them, and compute the loss without a gradient."""
        sharding.check_divided(self.accelerator, self.model_wrapped)
        dataset = inputs.loaded_dataset(dataloader)
        self._expect_images(dataset)
        size = self.args.num_generations_eval or self.args.num_generations
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        # Every rank takes equally many rows, so that collectives match; the surplus at the end does not count.
        share = math.ceil(len(dataset) / ranks)
        rows = range(rank * share, (rank + 1) * share)
        real = max(0, min(share, len(dataset) - rank * share)) * size
        wanted = [(row % len(dataset), 0, size) for row in rows]
        was_training = self.model_wrapped.training
        self._set_training(False)
        rollouts, metrics = self._collect(dataset, wanted, (self.args.seed, "eval"), size, real)
        firsts = {r.rewards[0] for r in rollouts[:real][self.own_rows] if r.rewards}
        self.rewards_are_binary = self._on_any_rank(bool(firsts)) and not self._on_any_rank(bool(firsts - {0, 1, None}))
        tally = Tally()
        metrics["loss"] = self._loss(rollouts, real, size, tally).item()
        metrics |= tally.reduce(self.accelerator)
        self.model_wrapped.train(was_training)
        self.clock.flush()
        if self.journal:
            self.journal.take(rollouts[:real], self.state.global_step, "eval", self._extra)
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=prefixed, num_samples=len(dataset))  # type: ignore[arg-type]
