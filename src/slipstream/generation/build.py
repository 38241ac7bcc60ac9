"""Choosing and starting the engine that a configuration asks for."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from slipstream import vllm_compat
from slipstream.config import OnlineConfig
from slipstream.generation.engine import Engine

# Arguments of from_pretrained that change how a model is loaded or computes, and not what.
NEUTRAL_INIT = {
    "attn_implementation", "dtype", "torch_dtype", "revision", "use_cache", "quantization_config", "device_map",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "trust_remote_code",
}  # fmt: skip


def build_engine(
    config: OnlineConfig,
    *,
    model: str | nn.Module,
    policy: Callable[[], nn.Module],
    tokenizer: Any,
    pad_token_id: int,
    eos_token_ids: Collection[int],
    rank: int,
    reference: Callable[[], AbstractContextManager[nn.Module]] | None = None,
) -> Engine:
    """Start the engine.

    Args:
        config: The trainer's configuration.
        model: What the trainer was given: a name or folder, or a module.
        policy: Returns the unwrapped model that is trained.
        tokenizer: Its tokenizer or processor.
        pad_token_id: Token that fills rows up.
        eos_token_ids: Tokens that end a completion.
        rank: Of this process.
        reference: Returns a context manager that gives the reference model while it is entered (the policy with its
            adapter off, for instance). Needed if requests will have a mixture above 0; an engine that holds weights of
            its own takes the reference's by `update_reference`. None: no reference.
    """
    assert config.steps_per_generation is not None
    if not config.use_vllm:
        from slipstream.generation.transformers import TransformersEngine

        return TransformersEngine(
            policy,
            pad_token_id=pad_token_id,
            eos_token_ids=sorted(eos_token_ids),
            seed=config.seed + rank,
            # An evaluation samples more rows than a training step: no more of them at a time.
            batch_size=config.micro_batch_rows * config.steps_per_generation,
            continuous_batching=_continuous_batching(config),
            reference=reference,
        )
    if config.vllm_mode == "server":
        from slipstream.generation.server import ServerEngine

        if isinstance(model, str) and (changes := _changes(model, config)):
            warnings.warn(
                f"model_init_kwargs gives the model another {', '.join(changes)} than its config.json: start the "
                "server with the same, by `slipstream vllm-serve --hf-overrides`, or it samples from another model.",
                UserWarning,
                stacklevel=2,
            )
        return ServerEngine(
            config.server_url,
            device=config.device,
            timeout=config.vllm_server_timeout,
            max_model_len=config.vllm_max_model_length,
            reference=reference is not None,
        )
    from slipstream.generation.colocate import ColocateEngine

    options: dict[str, Any] = dict(config.vllm_engine_kwargs or {})  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="slipstream-") as folder:
        if isinstance(model, str) and not _changes(model, config):
            source, revision = model, dict(config.model_init_kwargs or {}).get("revision")  # type: ignore[arg-type]
        else:
            # The engine needs the shape alone: its weights arrive from the trainer before the first token.
            source, revision = _save_shape(policy(), tokenizer, Path(folder)), None
            options = vllm_compat.without_weights() | options
        return ColocateEngine(
            model=source,
            revision=revision,
            dtype=options.pop("dtype", None) or _engine_dtype(config, policy()),
            max_model_len=config.vllm_max_model_length,
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            tensor_parallel_size=config.vllm_tensor_parallel_size,
            model_impl=config.vllm_model_impl,
            max_num_seqs=config.micro_batch_rows * config.steps_per_generation * config.vllm_tensor_parallel_size,
            seed=config.seed + rank // config.vllm_tensor_parallel_size,
            enable_sleep_mode=config.vllm_enable_sleep_mode,
            trust_remote_code=config.trust_remote_code,
            reference=reference is not None,
            engine_kwargs=options,
        )


def _changes(model: str, config: OnlineConfig) -> list[str]:
    """Settings of the model that `model_init_kwargs` changes: an engine that reads its config.json lacks them."""
    given = _settings_given(config)
    if "config" in given:
        return ["config"]
    saved = saved_config(model, config) if given else None
    return [name for name, value in given.items() if hasattr(saved, name) and getattr(saved, name) != value]


def model_config(model: Any, config: OnlineConfig) -> Any:
    """The configuration of a model, or of that of this name or folder, as `model_init_kwargs` changes it."""
    if not isinstance(model, str):
        return model.config
    given = _settings_given(config)
    return given["config"] if "config" in given else saved_config(model, config, **given)


def _settings_given(config: OnlineConfig) -> dict[str, Any]:
    options: dict[str, Any] = dict(config.model_init_kwargs or {})  # type: ignore[arg-type]
    return {name: value for name, value in options.items() if name not in NEUTRAL_INIT}


def saved_config(model: str, config: OnlineConfig, **changes: Any) -> Any:
    """The configuration that is saved with the model of that name or folder, with `changes`."""
    from transformers import AutoConfig

    revision = dict(config.model_init_kwargs or {}).get("revision", "main")  # type: ignore[arg-type]
    found, _ = AutoConfig.from_pretrained(
        model, revision=revision, trust_remote_code=config.trust_remote_code, return_unused_kwargs=True, **changes
    )
    return found


def check_sampling(config: OnlineConfig) -> None:
    """Raise ValueError where the engine that `config` asks for would refuse to sample as it says.

    A server's engine is asked with the first prompts, since vLLM need not be installed beside it.
    """
    sampling = config.sampling()
    if not config.use_vllm:
        from slipstream.generation.transformers import check_sampling as check

        check(sampling, continuous=config.use_transformers_continuous_batching)
    elif config.vllm_mode == "colocate":
        from slipstream.generation.vllm_options import check_sampling as check_vllm

        check_vllm(sampling)


def _continuous_batching(config: OnlineConfig) -> dict[str, Any] | None:
    if not config.use_transformers_continuous_batching:
        return None
    settings: dict[str, Any] = dict(config.transformers_continuous_batching_config or {})  # type: ignore[arg-type]
    # transformers' own default takes nearly all free memory, which the backward pass needs as well.
    return {"max_memory_percent": 0.5} | settings


def _save_shape(model: nn.Module, tokenizer: Any, folder: Path) -> str:
    given: Any = model
    base = given.get_base_model() if hasattr(given, "get_base_model") else given
    config = copy.deepcopy(base.config)
    # A model that was never loaded does not say so itself, and vLLM would guess one that cannot generate.
    config.architectures = config.architectures or [_architecture(base)]
    config.save_pretrained(folder)
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _architecture(model: nn.Module) -> str:
    """The name of a model's class in transformers: FSDP2 and users derive others from it, which vLLM does not know."""
    kinds, known = type(model).__mro__, ("transformers.models.", "transformers_modules.")
    return next((kind for kind in kinds if kind.__module__.startswith(known)), kinds[0]).__name__


def _engine_dtype(config: OnlineConfig, model: nn.Module) -> str:
    """What the trainer computes in: its autocast type, else its weights' own."""
    if config.bf16:
        return "bfloat16"
    if config.fp16:
        return "float16"
    return str(next(model.parameters()).dtype).removeprefix("torch.")
