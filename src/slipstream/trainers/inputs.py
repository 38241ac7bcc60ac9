"""What a trainer is given: datasets and reward functions, checked, and the loaders that transformers' loop walks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader
from transformers.trainer_utils import IntervalStrategy

from slipstream.config import OnlineConfig
from slipstream.generation.build import model_config
from slipstream.modeling.rope import original_length
from slipstream.rollouts.dialogue import Dialogue
from slipstream.rollouts.prompts import PromptRenderer
from slipstream.rollouts.rewards import reward_names
from slipstream.rollouts.sampler import PromptSampler
from slipstream.rollouts.tools import Toolbox

MODEL_LIMIT = "the model's limit"


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


def check_rows(config: OnlineConfig, train_dataset: Any, eval_dataset: Any) -> None:
    """Raise an error unless these are rows to train and to evaluate on, as far as `config` asks for that."""
    check_dataset("train_dataset", train_dataset)
    check_datasets("eval_dataset", eval_dataset)
    if eval_dataset is None and config.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={IntervalStrategy(config.eval_strategy).value!r} needs an eval_dataset: pass one, or "
            "leave eval_strategy out."
        )


def check_datasets(name: str, dataset: Any) -> None:
    """Raise an error unless `dataset` is what `check_dataset` lets pass, or a dict of such."""
    if isinstance(dataset, dict):
        for key, one in dataset.items():
            check_dataset(f"{name}[{key!r}]", one)
        return
    check_dataset(name, dataset)


def check_dataset(name: str, dataset: Any) -> None:
    """Raise an error unless `dataset` is None or rows with a prompt that can be read by position.

    Raises:
        ValueError: It is anything else.
    """
    if dataset is None:
        return
    if isinstance(dataset, dict):
        raise ValueError(
            f"{name} is a dict of {', '.join(map(repr, dataset))}: pass one of them, such as "
            f"dataset[{next(iter(dataset), 'train')!r}]."
        )
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


def dialogue(toolbox: Toolbox, renderer: PromptRenderer, eos_ids: set[int]) -> Dialogue | None:
    """How the chat template shows tools, checked; None where there is none to call."""
    if not toolbox.schemas:
        return None
    if "tools" in renderer.template_kwargs:
        raise ValueError("chat_template_kwargs has 'tools', and tools are given to the trainer: leave out the former.")
    return Dialogue(renderer.tokenizer, toolbox.schemas, renderer.template_kwargs, eos_ids)


def with_rewards(own: Sequence[Any], reward_funcs: Any, tokenizers: Any, args: Any) -> tuple[list[Any], Any, Any]:
    """`reward_funcs`, `reward_processing_classes` and `args` with further reward functions, of weight 1."""
    given = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    given = [] if reward_funcs is None else given
    if isinstance(tokenizers, list | tuple):
        tokenizers = [*tokenizers, *[None] * len(own)]
    elif tokenizers is not None:
        tokenizers = [tokenizers] * len(given) + [None] * len(own)
    if getattr(args, "reward_weights", None) is not None:
        args = copy.copy(args)
        args.reward_weights = [*args.reward_weights, *[1.0] * len(own)]
    return [*given, *own], tokenizers, args


def rows_of_environments(args: Any) -> list[dict[str, Any]] | None:
    """Rows for environments that give the prompts themselves: as many as a generation batch has; None without steps."""
    if getattr(args, "max_steps", 0) <= 0:
        return None
    row = {"prompt": [{"role": "user", "content": ""}]}
    return [row] * (args.generation_batch_size // args.num_generations)


def reward_lists(
    reward_funcs: Any, tokenizers: Any, args: OnlineConfig, judge: Any = None
) -> tuple[list[Any], list[Any]]:
    """`reward_funcs` and `reward_processing_classes` as lists of the same length; empty ones where a judge compares."""
    if judge is not None:
        if args.reward_weights is not None:
            raise ValueError(
                f"reward_weights={args.reward_weights!r} changes nothing where a judge compares: leave it out."
            )
        return [], []
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if reward_funcs is None or not functions:
        raise ValueError("reward_funcs is missing: pass a function, a reward model, or a list of them.")
    reward_names(functions)  # complains about what cannot be one before a model is loaded
    tokenizers = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(functions)
    if len(tokenizers) != len(functions):
        raise ValueError(
            f"reward_processing_classes has {len(tokenizers)} entries for {len(functions)} reward_funcs: give one for "
            "each, None for functions."
        )
    if args.reward_weights is not None and len(args.reward_weights) != len(functions):
        raise ValueError(f"reward_weights has {len(args.reward_weights)} values for {len(functions)} reward_funcs.")
    return functions, tokenizers


def longest_sequence(model: Any, config: OnlineConfig) -> tuple[int, str] | None:
    """Tokens that prompt and completion may have together, and whose limit that is; None: unknown.

    A server is asked for its own, where `vllm_max_model_length` does not say what will be asked of it.
    """
    found: list[tuple[int | None, str]]
    if config.use_vllm and config.vllm_max_model_length is not None:
        found = [(config.vllm_max_model_length, "vllm_max_model_length")]
    elif config.use_vllm and config.vllm_mode == "server":
        found = [(_server_limit(config), "the server's --max-model-len")]
    else:
        found = _model_limits(model, config)
    found.append((getattr(config, "max_length", None), "max_length"))
    return min(((limit, name) for limit, name in found if limit is not None), default=None)


def _server_limit(config: OnlineConfig) -> int:
    from slipstream.serving.client import VLLMClient

    with VLLMClient(base_url=config.server_url, connection_timeout=config.vllm_server_timeout) as client:
        return client.server_info().max_model_len


def _model_limits(model: Any, config: OnlineConfig) -> list[tuple[int | None, str]]:
    text = model_config(model, config).get_text_config()
    limits = [(getattr(text, "max_position_embeddings", None), MODEL_LIMIT)]
    if config.use_vllm:
        # vLLM's own choice where vllm_max_model_length is not given.
        limits.append((original_length(text), "vllm_max_model_length"))
    return limits


def fitting_rows(
    name: str, dataset: Any, renderer: PromptRenderer, longest: tuple[int, str] | None, config: OnlineConfig
) -> Any:
    """The rows of `dataset` (or of each of a dict of them) whose prompts leave room for `max_completion_length`.

    Of prompts with images the text alone is looked at; see `vision.check_prompt`.

    Raises:
        ValueError: a prompt is too long and `overlong_prompts` is `error`, or none is left.
    """
    if dataset is None or longest is None:
        return dataset
    if isinstance(dataset, dict):
        return {key: fitting_rows(f"{name}[{key!r}]", one, renderer, longest, config) for key, one in dataset.items()}
    limit, limited_by = longest
    room = limit - config.max_completion_length
    # Other columns may be costly to read (images).
    needed = [name for name in ("prompt", "environment") if name in dataset[0]]
    prompts = dataset.select_columns(needed) if hasattr(dataset, "select_columns") else dataset
    lengths = [renderer.text_tokens(prompts[row], row) for row in range(len(prompts))]
    too_long = [row for row, length in enumerate(lengths) if length > room]
    if not too_long:
        return dataset
    found = (
        f"{name}: {len(too_long)} of {len(lengths)} prompts are too long: row {too_long[0]} has "
        f"{lengths[too_long[0]]} tokens, and with max_completion_length={config.max_completion_length} that is more "
        f"than {limited_by} of {limit}"
    )
    if config.overlong_prompts == "error":
        raised = "" if limited_by == MODEL_LIMIT else f"raise {limited_by}, "
        raise ValueError(f"{found}. Shorten them, lower max_completion_length, {raised}or set overlong_prompts='skip'.")
    if len(too_long) == len(lengths):
        raise ValueError(f"{found}, and nothing is left when they are skipped.")
    warnings.warn(f"{found}. They are skipped.", UserWarning, stacklevel=4)
    dropped = set(too_long)
    kept = [row for row in range(len(lengths)) if row not in dropped]
    return dataset.select(kept) if hasattr(dataset, "select") else [dataset[row] for row in kept]
