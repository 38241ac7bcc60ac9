"""What a trainer is given: datasets and reward functions, checked, and the loaders that transformers' loop walks."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from slipstream.config import OnlineConfig
from slipstream.rollouts.sampler import PromptSampler


class _Positions:
    """A dataset as its positions: rows are read when their prompts are sampled, not by the data loader."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: Any) -> Any:
        return item


class SlotLoader(DataLoader):
    """The slots of an epoch, one at a time.

    transformers' loop tells the loader which epoch begins, but not a batch sampler that stands alone in it.
    """

    def __init__(self, dataset: Any, sampler: PromptSampler) -> None:
        super().__init__(_Positions(dataset), batch_sampler=sampler, collate_fn=first)  # type: ignore[arg-type]
        self._sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self._sampler.set_epoch(epoch)


def evaluation_loader(dataset: Any) -> DataLoader:
    """A loader that carries `dataset` to the evaluation loop, which reads the rows itself: see `loaded_dataset`."""
    return DataLoader(_Positions(dataset), batch_size=1, collate_fn=first)  # type: ignore[arg-type]


def loaded_dataset(loader: DataLoader) -> Any:
    """The dataset that `evaluation_loader` was given."""
    return loader.dataset.dataset  # type: ignore[attr-defined]


def first(batch: list[Any]) -> Any:
    """Collate batches of one."""
    return batch[0]


def check_datasets(name: str, dataset: Any) -> None:
    """Raise ValueError unless `dataset` is None, rows with a prompt that can be read by position, or a dict of such."""
    if isinstance(dataset, dict):
        for key, one in dataset.items():
            check_datasets(f"{name}[{key!r}]", one)
        return
    if dataset is None:
        return
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}, which cannot be read by position: streaming datasets are not "
            "supported. Load it without streaming=True."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty.")
    if "prompt" not in dataset[0]:
        raise ValueError(
            f"{name} has no column 'prompt'; its columns are {', '.join(map(repr, dataset[0]))}. Rename one: "
            "dataset.rename_column(..., 'prompt')."
        )


def reward_lists(reward_funcs: Any, tokenizers: Any, args: OnlineConfig) -> tuple[list[Any], list[Any]]:
    """`reward_funcs` and `reward_processing_classes` as lists of the same length."""
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if reward_funcs is None or not functions:
        raise ValueError("reward_funcs is missing: pass a function, a reward model, or a list of them.")
    tokenizers = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(functions)
    if len(tokenizers) != len(functions):
        raise ValueError(
            f"reward_processing_classes has {len(tokenizers)} entries for {len(functions)} reward_funcs: give one for "
            "each, None for functions."
        )
    if args.reward_weights is not None and len(args.reward_weights) != len(functions):
        raise ValueError(f"reward_weights has {len(args.reward_weights)} values for {len(functions)} reward_funcs.")
    return functions, tokenizers
