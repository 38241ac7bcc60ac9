"""The configuration that the five trainers share. Every value is checked here, before a model is loaded."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from slipstream.checks import number, one_of
from slipstream.generation.engine import Sampling
from slipstream.generation.team import check_team

# Arguments in generation_kwargs that leave the probabilities of tokens as they are.
NEUTRAL_SAMPLING = {
    "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens",
    "spaces_between_special_tokens", "detokenize",
}  # fmt: skip


def option(default: Any, help: str) -> Any:
    """A dataclass field with the help text that the command line shows."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class OnlineConfig(TrainingArguments):
    """What every trainer that samples its own training data needs to know.

    It is a `transformers.TrainingArguments`; the fields below come on top, or have another default. Batch sizes count
    completions: `generation_batch_size = per_device_train_batch_size * processes * steps_per_generation`, and it holds
    `generation_batch_size / num_generations` different prompts.

    Raises:
        ValueError: a value is out of range, or two values contradict each other.
    """

    learning_rate: float = option(1e-6, "Initial learning rate of AdamW.")
    logging_steps: float = option(10, "Log every so many optimizer steps (below 1: a share of all steps).")
    gradient_checkpointing: bool = option(True, "Trade compute for memory by recomputing activations.")
    bf16: bool | None = option(  # type: ignore[assignment]
        None, "bfloat16 mixed precision. None: on where an accelerator supports it, off on a CPU or with fp16."
    )
    remove_unused_columns: bool | None = option(  # type: ignore[assignment]
        False, "Whether to drop dataset columns; they are kept, since reward functions read them."
    )

    # The model
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Arguments for from_pretrained when the model is given by name; `dtype` is float32 unless set here."
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the model. Only for models you trust.")
    disable_dropout: bool = option(False, "Switch dropout off while training.")

    # The rollouts
    num_generations: int = option(8, "Completions sampled for each prompt.")
    num_generations_eval: int | None = option(None, "The same in evaluation; None: as in training.")
    max_completion_length: int = option(512, "Largest number of tokens of a completion.")
    overlong_prompts: str = option(
        "error", "What to do with prompts that leave no room for max_completion_length: `error`, or `skip` them."
    )
    shuffle_dataset: bool = option(True, "Draw the prompts in a new random order each epoch.")
    generation_batch_size: int | None = option(None, "Completions generated at a time, over all processes.")
    steps_per_generation: int | None = option(
        None, "Micro-batches made of each generation batch; None: gradient_accumulation_steps."
    )
    temperature: float = option(1.0, "Sampling temperature; the trainer's log-probabilities use it as well.")
    top_p: float = option(1.0, "Nucleus sampling mass; 1.0 keeps every token.")
    top_k: int = option(0, "Number of most likely tokens kept; 0 keeps every token.")
    min_p: float | None = option(None, "Smallest token probability, relative to the most likely token's.")
    repetition_penalty: float = option(1.0, "Above 1 discourages repeated tokens.")
    eval_temperature: float | None = option(
        None, "Sampling temperature in evaluation (0 is greedy); None: as in training."
    )
    generation_kwargs: dict[str, Any] | str | None = option(None, "Further arguments for the engine's sampling class.")
    chat_template_kwargs: dict[str, Any] | str | None = option(None, "Further variables for the chat template.")

    packing: bool = option(True, "Train on rows without padding, where the model's attention allows it.")
    share_prompts: bool = option(
        True, "With packing: compute a prompt once for its completions, where that saves more than a tenth."
    )
    max_tokens_per_micro_batch: int | None = option(
        None,
        "With packing: tokens of a micro-batch. None: as many as fit into the GPU's free memory, measured before the "
        "first step; on a CPU those of per_device_train_batch_size rows of the longest.",
    )
    pad_to_multiple_of: int | str | None = option(
        "auto", "Pad micro-batches to a multiple of this many tokens; `auto` and None: no further than needed."
    )
    cache_implementation: str | None = option(None, "Key-value cache of transformers' generation.")
    ds3_gather_for_generation: bool = option(
        True, "Gather ZeRO-3 weights for transformers' generation; without DeepSpeed it changes nothing."
    )
    use_transformers_continuous_batching: bool = option(False, "Generate with transformers' continuous batching.")
    transformers_continuous_batching_config: dict[str, Any] | str | None = option(None, "Its settings.")
    use_transformers_paged: bool = option(False, "The older name of use_transformers_continuous_batching.")

    # vLLM
    use_vllm: bool = option(False, "Generate with vLLM; without it, transformers generates.")
    vllm_mode: str = option("colocate", "`colocate`: vLLM inside this process. `server`: a `slipstream vllm-serve`.")
    vllm_model_impl: str = option("vllm", "`vllm`: its own model code. `transformers`: its transformers backend.")
    vllm_enable_sleep_mode: bool = option(False, "Let vLLM give its GPU memory back while the trainer works.")
    vllm_sleep_level: int = option(
        2, "1 keeps the engine's weights in host memory while it sleeps, 2 drops them (the trainer sends them anyway)."
    )
    vllm_gpu_memory_utilization: float = option(0.3, "Share of the GPU's memory that vLLM may take (colocate).")
    vllm_max_model_length: int | None = option(
        None, "Longest prompt + completion of the engine; None: the model's, or the server's."
    )
    vllm_tensor_parallel_size: int = option(1, "GPUs (colocate: processes) that one engine's weights are split over.")
    vllm_server_base_url: str | None = option(None, "URL of the server; replaces its host and port.")
    vllm_server_host: str = option("0.0.0.0", "Host of the server.")
    vllm_server_port: int = option(8000, "Port of the server.")
    vllm_server_timeout: float = option(240.0, "Seconds to wait for the server, at the start and when it is lost.")
    vllm_group_port: int = option(51216, "Taken for TRL's sake: the exchange of weights needs no port of its own.")
    vllm_structured_outputs_regex: str | None = option(None, "A regular expression that completions must match.")
    vllm_engine_kwargs: dict[str, Any] | str | None = option(
        None, "Any other argument of vLLM's engine, by vLLM's own names."
    )

    # What is shown
    log_completions: bool = option(False, "Print a table of prompts and completions every `logging_steps`.")
    num_completions_to_print: int | None = option(None, "Rows of that table; None: all of them.")
    log_unique_prompts: bool = option(False, "Show each prompt once in that table.")
    log_multimodal: bool = option(True, "Accepted; images are not shown, [image] stands in their place.")
    log_completions_hub_repo: str | None = option(
        None, "Dataset repository on the Hub that completions.jsonl is uploaded to."
    )
    html_report: bool = option(True, "Write `report.html`, one file with all curves and completions, at the end.")

    reward_weights: list[float] | None = option(None, "Weight of each reward function; None: 1.0 each.")
    reward_timeout: float = option(600.0, "Seconds that asynchronous reward functions may take for one batch.")

    # Fields that may be given as a JSON object in a string (transformers parses them).
    _VALID_DICT_FIELDS = [  # noqa: RUF012, transformers' own name and form
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
        "transformers_continuous_batching_config",
        "vllm_engine_kwargs",
    ]

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and _accelerator_has_bf16() and not self.use_cpu
        super().__post_init__()
        self._check_values()
        self._resolve_batch_sizes()
        self._check_batch_sizes()

    def _check_values(self) -> None:
        number("num_generations", self.num_generations, least=1, integer=True)
        if self.num_generations_eval is not None:
            number("num_generations_eval", self.num_generations_eval, least=1, integer=True)
        number("max_completion_length", self.max_completion_length, least=1, integer=True)
        number("temperature", self.temperature, above=0)
        if self.eval_temperature is not None:
            number("eval_temperature", self.eval_temperature, least=0)
        number("top_p", self.top_p, above=0, most=1)
        number("top_k", self.top_k, least=0, integer=True)
        if self.min_p is not None:
            number("min_p", self.min_p, least=0, most=1)
        number("repetition_penalty", self.repetition_penalty, above=0)
        one_of("overlong_prompts", self.overlong_prompts, ("error", "skip"))
        number("reward_timeout", self.reward_timeout, above=0)
        if self.reward_weights is not None:
            if not isinstance(self.reward_weights, list | tuple):
                raise ValueError(
                    f"reward_weights={self.reward_weights!r} is not allowed: it must be a list of numbers."
                )
            for i, weight in enumerate(self.reward_weights):
                number(f"reward_weights[{i}]", weight)
        if self.num_completions_to_print is not None:
            number("num_completions_to_print", self.num_completions_to_print, least=1, integer=True)
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1 and "LOCAL_RANK" in os.environ and self.world_size == 1:
            raise ValueError(
                f"{started} processes were started, and transformers takes each for a run of its own, in the same "
                "output_dir: without an accelerator they train together only with use_cpu=True. Set it, or start one."
            )
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} devices in one process: transformers would copy the model to each for every forward "
                "pass, which cannot work here. Start one process a device with `accelerate launch` or `torchrun`, or "
                "use a single device: CUDA_VISIBLE_DEVICES=0."
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size=True is not supported: a smaller batch would cut groups of completions apart. "
                "Lower per_device_train_batch_size and raise gradient_accumulation_steps instead."
            )
        if self.max_tokens_per_micro_batch is not None:
            number("max_tokens_per_micro_batch", self.max_tokens_per_micro_batch, least=1, integer=True)
        self._check_padding()
        self._check_vllm()
        if self.use_transformers_paged:
            warnings.warn(
                "use_transformers_paged is the older name of use_transformers_continuous_batching: use that one.",
                FutureWarning,
                stacklevel=4,
            )
            self.use_transformers_continuous_batching = True
        if self.log_completions_hub_repo is not None and not self.log_completions:
            raise ValueError(
                f"log_completions_hub_repo={self.log_completions_hub_repo!r} has nothing to upload without "
                "log_completions=True: set both."
            )

    def _check_padding(self) -> None:
        if isinstance(self.pad_to_multiple_of, str):
            # The command line and YAML files pass words.
            words: dict[str, int | None] = {"auto": None, "none": None, "null": None}
            word = self.pad_to_multiple_of.lower()
            self.pad_to_multiple_of = int(word) if word.isdigit() else words.get(word, -1)
        if self.pad_to_multiple_of is not None:
            number("pad_to_multiple_of", self.pad_to_multiple_of, least=1, integer=True)

    def _check_vllm(self) -> None:
        one_of("vllm_mode", self.vllm_mode, ("colocate", "server"))
        one_of("vllm_model_impl", self.vllm_model_impl, ("vllm", "transformers"))
        one_of("vllm_sleep_level", self.vllm_sleep_level, (1, 2))
        number("vllm_gpu_memory_utilization", self.vllm_gpu_memory_utilization, above=0, most=1)
        number("vllm_tensor_parallel_size", self.vllm_tensor_parallel_size, least=1, integer=True)
        if self.vllm_max_model_length is not None:
            number("vllm_max_model_length", self.vllm_max_model_length, least=2, integer=True)
        number("vllm_server_port", self.vllm_server_port, least=1, most=65535, integer=True)
        number("vllm_server_timeout", self.vllm_server_timeout, above=0)
        url = self.vllm_server_base_url
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(f"vllm_server_base_url={url!r} is not allowed: it must begin with http:// or https://.")
        if self.use_vllm and self.vllm_mode == "server":
            self._check_server_mode()
        elif self.use_vllm and self.vllm_tensor_parallel_size > 1:
            check_team(self.vllm_tensor_parallel_size, self.world_size)
        if self.use_vllm and self.vllm_enable_sleep_mode:
            from slipstream.vllm_compat import check_sleep_supported

            check_sleep_supported()

    def _check_server_mode(self) -> None:
        """What shapes the engine is the server's own affair."""
        if self.vllm_engine_kwargs:
            raise ValueError(
                f"vllm_engine_kwargs={self.vllm_engine_kwargs!r} does not go with vllm_mode='server', whose engine is "
                "started by `slipstream vllm-serve`: give them to it as flags."
            )
        for name, given in (
            ("vllm_enable_sleep_mode", self.vllm_enable_sleep_mode),
            ("vllm_tensor_parallel_size", self.vllm_tensor_parallel_size != 1),
        ):
            if given:
                warnings.warn(
                    f"{name}={getattr(self, name)!r} changes nothing with vllm_mode='server', whose devices are its "
                    "own: give `slipstream vllm-serve` what its engine needs as flags.",
                    UserWarning,
                    stacklevel=5,
                )
        self.vllm_enable_sleep_mode = False

    @property
    def server_url(self) -> str:
        """Where the server is (`vllm_mode="server"`). The address 0.0.0.0, which servers listen on, is this machine."""
        if self.vllm_server_base_url is not None:
            return self.vllm_server_base_url.rstrip("/")
        host = "127.0.0.1" if self.vllm_server_host == "0.0.0.0" else self.vllm_server_host
        return f"http://{host}:{self.vllm_server_port}"

    @property
    def _reshaping(self) -> list[str]:
        """Settings that make the engine sample from another distribution than softmax(logits / temperature)."""
        active = {
            "top_p": self.top_p < 1,
            "top_k": self.top_k > 0,
            "min_p": bool(self.min_p),
            "repetition_penalty": self.repetition_penalty != 1,
            "vllm_structured_outputs_regex": self.vllm_structured_outputs_regex is not None,
            "generation_kwargs": not set(self.generation_kwargs or {}) <= NEUTRAL_SAMPLING,
        }
        return [name for name, on in active.items() if on]

    @property
    def micro_batch_rows(self) -> int:
        """Completions of one micro-batch of one process."""
        return self.per_device_train_batch_size

    @property
    def samples_from_reference(self) -> bool:
        """Whether the reference has a part in what is sampled."""
        return False

    def _resolve_batch_sizes(self) -> None:
        a_step = self.micro_batch_rows * self.world_size
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            # Both are set after a round trip through to_dict(); then they must agree.
            if self.generation_batch_size != a_step * self.steps_per_generation:
                raise ValueError(
                    f"generation_batch_size={self.generation_batch_size} and steps_per_generation="
                    f"{self.steps_per_generation} contradict each other: set one of them "
                    f"(per_device_train_batch_size={self.per_device_train_batch_size} makes {a_step} completions over "
                    "all processes)."
                )
        elif self.generation_batch_size is not None:
            number("generation_batch_size", self.generation_batch_size, least=1, integer=True)
            if self.generation_batch_size % a_step:
                raise ValueError(
                    f"generation_batch_size={self.generation_batch_size} must be a multiple of the {a_step} "
                    f"completions that per_device_train_batch_size={self.per_device_train_batch_size} makes, over all "
                    "processes."
                )
            self.steps_per_generation = self.generation_batch_size // a_step
        else:
            if self.steps_per_generation is None:
                self.steps_per_generation = self.gradient_accumulation_steps
            number("steps_per_generation", self.steps_per_generation, least=1, integer=True)
            self.generation_batch_size = a_step * self.steps_per_generation

    def _check_batch_sizes(self) -> None:
        assert self.generation_batch_size is not None
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"generation_batch_size={self.generation_batch_size} (per_device_train_batch_size="
                f"{self.per_device_train_batch_size} * {self.world_size} processes * steps_per_generation="
                f"{self.steps_per_generation}) must be a multiple of num_generations={self.num_generations}, so that "
                "every prompt has its whole group."
            )

    def _engine_sampling(self) -> dict[str, Any]:
        extra: dict[str, Any] = dict(self.generation_kwargs or {})  # type: ignore[arg-type]
        if self.cache_implementation is not None and not self.use_vllm:
            extra.setdefault("cache_implementation", self.cache_implementation)
        return extra

    def sampling(self, *, evaluation: bool = False) -> Sampling:
        """The sampling parameters of training, or of evaluation."""
        temperature = self.temperature
        if evaluation and self.eval_temperature is not None:
            temperature = self.eval_temperature
        return Sampling(
            max_tokens=self.max_completion_length,
            temperature=temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty,
            # The trainer scores at its own temperature and without filters: log-probabilities under any other
            # distribution cannot be compared with its.
            logprobs=self.use_vllm and temperature == self.temperature and not self._reshaping,
            regex=self.vllm_structured_outputs_regex,
            extra=self._engine_sampling(),
        )


def _accelerator_has_bf16() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
