"""Which prompts are sampled when: a plan that follows from the seed alone, on every rank and after a resume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Slot:
    """One micro-step of transformers' training loop: slice `index` of generation batch `batch` of `epoch`.

    With S steps_per_generation and num_iterations replays, `index` runs from 0 to S * num_iterations - 1.
    """

    epoch: int
    batch: int
    index: int


class PromptSampler:
    """The batch sampler of the training data: yields every slot of an epoch, in order.

    Args:
        dataset_size: Rows of the dataset.
        prompts_per_batch: Different prompts of a generation batch; an incomplete last batch of an epoch is left out.
        slots_per_batch: Slots made of each generation batch.
        seed: Of the permutation, which is a new one each epoch.
        shuffle: False keeps the dataset's order.

    Raises:
        ValueError: the dataset has fewer rows than one generation batch has prompts.
    """

    def __init__(
        self, dataset_size: int, prompts_per_batch: int, slots_per_batch: int, seed: int, shuffle: bool = True
    ) -> None:
        if dataset_size < prompts_per_batch:
            raise ValueError(
                f"train_dataset has {dataset_size} rows, but one generation batch needs {prompts_per_batch} different "
                "prompts (generation_batch_size / num_generations): nothing would be trained. Lower "
                "per_device_train_batch_size, gradient_accumulation_steps or steps_per_generation, raise "
                "num_generations, or bring more prompts."
            )
        self.dataset_size = dataset_size
        self.prompts_per_batch = prompts_per_batch
        self.slots_per_batch = slots_per_batch
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    @property
    def batches(self) -> int:
        """Generation batches of an epoch."""
        return self.dataset_size // self.prompts_per_batch

    def __len__(self) -> int:
        return self.batches * self.slots_per_batch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Slot]]:
        for batch in range(self.batches):
            for index in range(self.slots_per_batch):
                yield [Slot(self.epoch, batch, index)]

    def prompts(self, epoch: int, batch: int) -> list[int]:
        """Dataset positions of the prompts of a generation batch."""
        first = batch * self.prompts_per_batch
        if not self.shuffle:
            return list(range(first, first + self.prompts_per_batch))
        order = torch.randperm(self.dataset_size, generator=torch.Generator().manual_seed(self.seed + epoch))
        return order[first : first + self.prompts_per_batch].tolist()


def prompt_seed(*parts: int | str) -> int:
    """The sampling seed of a prompt's first completion, from whatever identifies it; completion i uses seed + i.

    It does not depend on the number of ranks nor on which rank samples the prompt.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    # 62 bits: seed + i stays within the signed 64 bits that samplers accept.
    return int.from_bytes(digest, "big") >> 2
