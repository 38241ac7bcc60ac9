"""What transformers' training loop asks for: slots of generation batches in the place of rows of a dataset."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from slipstream.config import OnlineConfig
from slipstream.rollouts.sampler import PromptSampler
from slipstream.trainers import inputs
from slipstream.trainers.algorithm import Algorithm


class SlotLoop(Algorithm):
    """Loaders and counters of a trainer."""

    _sampler: PromptSampler
    _step_flops: int

    @property
    def _steps_per_generation(self) -> int:
        assert self.args.steps_per_generation is not None  # resolved by the config
        return self.args.steps_per_generation

    @staticmethod
    def make_sampler(args: OnlineConfig, rows: int) -> PromptSampler:
        """The plan of a run over `rows` rows. Raises ValueError if they are too few."""
        assert args.generation_batch_size is not None
        assert args.steps_per_generation is not None
        return PromptSampler(
            rows,
            args.generation_batch_size // args.num_generations,
            args.steps_per_generation * getattr(args, "num_iterations", 1),
            args.seed if args.data_seed is None else args.data_seed,
            args.shuffle_dataset,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Slots, not rows: every rank walks through all of them and takes its share of each generation batch."""
        if self.train_dataset is None:
            raise ValueError("train_dataset=None: pass the prompts to train on.")
        # Made anew for each run: the dataset may have been replaced.
        self._sampler = self.make_sampler(self.args, len(self.train_dataset))  # type: ignore[arg-type]
        return inputs.SlotLoader(self.train_dataset, self._sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The rows of an evaluation dataset (given, or named among those of the constructor), not yet rendered."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]  # type: ignore[index]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("eval_dataset=None: pass the prompts to evaluate on.")
        inputs.check_datasets("eval_dataset", dataset)
        return inputs.evaluation_loader(dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The rows that `predict` is given; it samples and scores them as `evaluate` does."""
        inputs.check_dataset("test_dataset", test_dataset)
        return inputs.evaluation_loader(test_dataset)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The slots of one optimizer step."""
        if self.state.global_step >= self.state.max_steps:
            # Resumed from its last checkpoint. Transformers would take one step more before it looks.
            self.control.should_training_stop = True
            return [], None
        return [slot for _, slot in zip(range(num_batches), epoch_iterator, strict=False)], None

    def _track_num_input_tokens(self, slot: Any) -> None:
        """Nothing: tokens are counted when they are sampled, whatever `include_num_input_tokens_seen` says."""

    def floating_point_ops(self, slot: Any) -> int:
        """Operations of the last optimizer step: six for each parameter and token, counted once a step."""
        operations, self._step_flops = self._step_flops, 0
        return operations

    def _checked_args(self, args: Any, model: str | nn.Module) -> Any:
        """`args`, or the defaults in their place; a TypeError for another trainer's."""
        if args is not None:
            if not isinstance(args, self.config_class):
                raise TypeError(
                    f"args is a {type(args).__module__}.{type(args).__name__}: {type(self).__name__} takes a "
                    f"slipstream.{self.config_class.__name__}."
                )
            return args
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
        algorithm = type(self).__name__.removesuffix("Trainer")
        return self.config_class(output_dir=f"{str(name).rstrip('/').split('/')[-1]}-{algorithm}")
