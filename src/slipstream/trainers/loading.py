"""Loading what a trainer needs: the policy, its tokenizer, its reference."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from slipstream.checks import one_of
from slipstream.config import OnlineConfig
from slipstream.generation.build import model_config, saved_config
from slipstream.trainers import vision

DTYPES = ("auto", "bfloat16", "float16", "float32")
# LoRA's ways to begin which do not change the weights below it.
NEUTRAL_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def load_policy(
    model: str | nn.Module, config: OnlineConfig, quantization_config: Any = None, images: bool = False
) -> nn.Module:
    """The model to train: `model` itself, or the causal language model of that name or folder, float32 by default.

    With `images`, or where that model has no other form, the one that takes images beside text.
    """
    options = dict(config.model_init_kwargs or {})  # type: ignore[arg-type]
    if quantization_config is not None and (not isinstance(model, str) or "quantization_config" in options):
        given = "model_init_kwargs holds one too" if isinstance(model, str) else f"model is a {type(model).__name__}"
        raise ValueError(
            f"quantization_config is for loading a model by its name, and {given}: give it in one place, where the "
            "model is loaded."
        )
    if not isinstance(model, str):
        if options:
            raise ValueError(
                f"model_init_kwargs={options!r} is for a model given by name, but a {type(model).__name__} was given: "
                "pass these arguments where you load it."
            )
        return model
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    sees = vision.loads_with_images(_config_if_any(model, config), images)
    kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    if "torch_dtype" in options:  # the older name; given beside the other, transformers would pass over it
        older = options.pop("torch_dtype")
        if options.setdefault("dtype", older) != older:
            raise ValueError(
                f"model_init_kwargs has dtype={options['dtype']!r} and torch_dtype={older!r}, its older name: give one."
            )
    dtype = options.setdefault("dtype", "float32")
    if isinstance(dtype, str):
        one_of("model_init_kwargs['dtype']", dtype, DTYPES)
        options["dtype"] = dtype if dtype == "auto" else getattr(torch, dtype)
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    return kind.from_pretrained(model, trust_remote_code=config.trust_remote_code, **options)


def load_tokenizer(processing_class: Any, model: str | nn.Module, config: OnlineConfig, images: bool = False) -> Any:
    """The tokenizer of `model`, or the tokenizer or processor that is given, with a padding token.

    A vision-language model's is its processor, which there must be with `images`.
    """
    if processing_class is None:
        name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        if not name:
            raise ValueError(
                "processing_class=None, but the model does not know where it came from: pass its tokenizer."
            )
        processing_class = _saved_beside(name, model, config, images)
    tokenizer = text_tokenizer(processing_class)
    if not hasattr(tokenizer, "eos_token"):
        raise TypeError(
            f"processing_class={processing_class!r} is neither a tokenizer nor a processor: pass what "
            "AutoTokenizer.from_pretrained returns, or None for the model's own."
        )
    if images and image_processor(processing_class) is None:
        raise TypeError(
            f"processing_class is a {type(processing_class).__name__}, which makes no tensors of images: pass what "
            "AutoProcessor.from_pretrained returns, or None for the model's own."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a pad_token nor an eos_token: set tokenizer.pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
    return processing_class


def _saved_beside(name: str, model: str | nn.Module, config: OnlineConfig, images: bool) -> Any:
    from transformers import AutoProcessor, AutoTokenizer

    options: dict[str, Any] = dict(config.model_init_kwargs or {})  # type: ignore[arg-type]
    source = {"revision": options.get("revision", "main"), "trust_remote_code": config.trust_remote_code}
    try:
        if images or vision.is_vision_language(_config_if_any(model, config)):
            # Whatever is wrong with a processor, among it tokens that its tokenizer lacks, text does without.
            with contextlib.nullcontext() if images else contextlib.suppress(Exception):
                return AutoProcessor.from_pretrained(name, **source)
        return AutoTokenizer.from_pretrained(name, **source)
    except (ImportError, OSError, ValueError, AttributeError) as error:
        kind = "processor, which prompts with images need," if images else "tokenizer"
        known = next((k for k in (ImportError, OSError) if isinstance(error, k)), ValueError)
        raise known(
            f"model={name!r}: no {kind} of that folder or name can be loaded ({error}). Give a folder that "
            "save_pretrained has written, or a model's name on the hub."
        ) from error


def _config_if_any(model: str | nn.Module, config: OnlineConfig) -> Any | None:
    """A model's configuration; None where there is none, as in a folder with an adapter alone."""
    try:
        return model_config(model, config)
    except (OSError, ValueError):
        return None


def image_processor(processing_class: Any) -> Any | None:
    """`processing_class` if it makes tensors of images, else None."""
    return processing_class if hasattr(processing_class, "image_processor") else None


def text_tokenizer(processing_class: Any) -> Any:
    """A processor's tokenizer, or the tokenizer itself."""
    return getattr(processing_class, "tokenizer", processing_class)


def check_adapter(model: str | nn.Module, peft_config: Any) -> None:
    """Raise an error unless `peft_config` is None or can be put on `model`, as far as that shows beforehand."""
    if peft_config is None:
        return
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ImportError("peft_config was given, but peft is not installed: pip install 'slipstream[peft]'") from error
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config={peft_config!r} is not a peft.PeftConfig, such as peft.LoraConfig(...).")
    if peft_config.is_prompt_learning:
        # Without vLLM neither: their virtual tokens are logits too many, and their keys and values fit no mask here.
        raise NotImplementedError(
            f"peft_config is a {type(peft_config).__name__}: adapters that train tokens, or keys and values, before "
            "the prompt cannot be trained here, and the engine does not know them: use LoRA."
        )
    if hasattr(model, "disable_adapter"):
        raise ValueError("peft_config was given, but the model has an adapter already: pass one or the other.")


def add_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    """Wrap `model` in a PEFT adapter; its other parameters are frozen."""
    from peft import get_peft_model

    return get_peft_model(model, peft_config)


def load_reference(
    model: str | nn.Module,
    policy: nn.Module,
    config: OnlineConfig,
    given: nn.Module | None = None,
    quantization_config: Any = None,
    images: bool = False,
) -> nn.Module | None:
    """The reference, frozen: the model that is given for it, or the initial policy.

    None when that is inside the policy, which is a new adapter on top of it (adapter off).
    """
    if given is not None:
        return given.requires_grad_(False).eval()
    # An adapter that came with the model may have been trained already: its base is not the initial policy.
    if hasattr(policy, "disable_adapter") and not hasattr(model, "disable_adapter") and _leaves_base_alone(policy):
        return None
    # A fresh copy of the same file is cheaper than a copy in memory, and right even if the policy was resumed.
    if isinstance(model, str):
        reference = load_policy(model, config, quantization_config, images)
    else:
        reference = copy.deepcopy(policy)
    return reference.requires_grad_(False).eval()


def _leaves_base_alone(policy: Any) -> bool:
    """Whether the model below a new adapter is, and stays, what it was without one."""
    adapters = policy.peft_config.values()
    # Biases are trained in place. PiSSA and its like take out of the weights what the adapter begins with.
    return all(
        getattr(adapter, "bias", "none") == "none" and getattr(adapter, "init_lora_weights", True) in NEUTRAL_INITS
        for adapter in adapters
    )


def known_eos_ids(model: str | nn.Module, processing_class: Any, config: OnlineConfig) -> set[int]:
    """`end_of_sequence_ids`, before the model is loaded."""
    from transformers import GenerationConfig

    tokenizer = text_tokenizer(processing_class)
    if not isinstance(model, str):
        return end_of_sequence_ids(model, tokenizer)
    options: dict[str, Any] = dict(config.model_init_kwargs or {})  # type: ignore[arg-type]
    revision = options.get("revision", "main")
    try:
        generation = GenerationConfig.from_pretrained(model, revision=revision)
    except OSError:  # it has none of its own: transformers makes it from the model's
        generation = GenerationConfig.from_model_config(saved_config(model, config))
    return end_of_sequence_ids(SimpleNamespace(generation_config=generation), tokenizer)


def end_of_sequence_ids(model: Any, tokenizer: Any) -> set[int]:
    """Token ids that end a completion: the generation config's and the tokenizer's."""
    ids: set[int] = set()
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for value in (configured, tokenizer.eos_token_id):
        if value is not None:
            ids.update(value if isinstance(value, list) else [value])
    if not ids:
        raise ValueError(
            "neither model.generation_config.eos_token_id nor the tokenizer's eos_token is set: completions could "
            "never end. Set tokenizer.eos_token."
        )
    return ids


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, also those that modules keep as numbers (attention does)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
                setattr(module, name, 0.0)
