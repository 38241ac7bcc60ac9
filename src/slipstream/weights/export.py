"""Named full tensors out of a training model, under the names of its checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")  # attributes of torch.compile's and checkpointing's wrappers


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile and DistributedDataParallel wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the full value of every weight of `model`, once, as its checkpoint would hold them.

    Weights are parameters, and buffers of floating point that are saved with the model (a mixture's
    `e_score_correction_bias`, Gemma 4's `layer_scalar`), since engines load those, too. The model may be compiled,
    wrapped in DistributedDataParallel, sharded by FSDP2 (each weight is gathered when its turn comes, on all ranks
    together), and carry LoRA adapters. The active adapters are merged into copies (none within
    `model.disable_adapter()`): a tensor without adapter is the training weight itself (do not write to it), one with an
    adapter is new. Modules that an adapter replaced (`modules_to_save`) give the replacement. Tied weights come once,
    under the first name.

    Raises:
        NotImplementedError: FSDP1, DeepSpeed ZeRO-3, quantized weights, adapters other than LoRA, or an adapter on one
            of two tied embeddings.
    """
    model = unwrap(model)
    base: Any = model
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        _check_prompt_learning(model)
        base = base.get_base_model()
    _check_tied_embeddings(base)  # transformers puts adapters on without a model of PEFT's around it
    found: list[tuple[str, nn.Module | Tensor]] = []
    _walk(base, "", found)
    tensors = _values(found)
    if _has_renamed_weights(base):
        from transformers.core_model_loading import revert_weight_conversion

        # One checkpoint tensor can be made of several weights, so this step needs them all.
        tensors = iter(revert_weight_conversion(base, dict(tensors)).items())
    yield from tensors


class Weights:
    """The named tensors of a model, which can be walked through more than once: see `named_tensors`.

    Args:
        model: The model; its weights are read when they are walked through.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return named_tensors(self._model)


def _walk(module: nn.Module, prefix: str, found: list[tuple[str, nn.Module | Tensor]]) -> None:
    """Add name and tensor of each weight inside `module` to `found`, and prefix and layer of each with LoRA.

    A generator within each module would take several times as long for a model of hundreds.
    """
    kinds = _kinds(type(module))  # type: ignore[arg-type]
    if "FullyShardedDataParallel" in kinds:
        raise NotImplementedError(
            "weights sharded by FSDP version 1 cannot be exported yet; set fsdp_version: 2 in the accelerate config"
        )
    if "ModulesToSaveWrapper" in kinds:
        on = () if module.disable_adapters else module.active_adapters
        active = [name for name in on if name in module.modules_to_save]  # type: ignore
        _walk(module.modules_to_save[active[0]] if active else module.original_module, prefix, found)  # type: ignore
        return
    if "LoraLayer" in kinds:
        found.append((prefix, module))
        return
    if kinds & {"BaseTunerLayer", "AuxiliaryTrainingWrapper"}:
        raise NotImplementedError(
            f"{prefix.rstrip('.')}: adapters of type {type(module).__name__} cannot be merged into the weights that go "
            "to the engine. Use LoRA."
        )
    for name, own in module._parameters.items():  # modules' own iterators take ten times as long
        if own is not None:
            _check_parameter(prefix + name, own)
            found.append((prefix + name, own))
    for name, buffer in module._buffers.items():
        # Others than floats are tables and counters, which an engine makes for itself.
        if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
            found.append((prefix + name, buffer))
    for name, child in module._modules.items():
        if child is not None:
            _walk(child, prefix if name in _WRAPPED else f"{prefix}{name}.", found)


@functools.cache
def _kinds(kind: type) -> frozenset[str]:
    """Names of the classes that a class of PEFT's or FSDP's is made of; empty for all others."""
    if kind.__module__.startswith(("peft.", "torch.distributed.fsdp.")):
        return frozenset(cls.__name__ for cls in kind.__mro__)
    return frozenset()


def _values(found: list[tuple[str, nn.Module | Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Name and full value of what `_walk` has found, each tensor once."""
    seen: set[int] = set()
    for name, owner in found:
        # A merged value is a passing object, whose id may be given to the next one: the weight is what is seen.
        parts = _merged(owner, name) if isinstance(owner, nn.Module) else ((name, owner, owner),)
        for of, weight, value in parts:
            if id(weight) not in seen:
                seen.add(id(weight))
                yield of, _full(value)


def _merged(layer: Any, prefix: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight, and value with the active adapters' changes added out of place, of the base layer."""
    if type(layer).__name__ == "ParamWrapper":
        raise NotImplementedError(f"{prefix.rstrip('.')}: LoRA on a parameter (target_parameters) cannot be exported")
    trained = layer.lora_embedding_A if len(layer.lora_embedding_A) else layer.lora_A
    active = () if layer.disable_adapters else layer.active_adapters
    adapters = [name for name in active if name in trained and name not in layer.merged_adapters]
    below: list[tuple[str, Any]] = []
    _walk(layer.get_base_layer(), "", below)
    for name, weight in below:
        value = weight
        with torch.no_grad():
            for adapter in adapters:
                if name == "weight":
                    if adapter in getattr(layer, "lora_variant", {}):  # DoRA and the like
                        value = layer.lora_variant[adapter].merge_safe(layer, adapter, value.detach().clone())
                    else:
                        value = (value + layer.get_delta_weight(adapter)).to(weight.dtype)
                elif name == "bias" and layer.lora_bias.get(adapter):
                    value = (value + layer.lora_B[adapter].bias * layer.scaling[adapter]).to(weight.dtype)
        yield prefix + name, weight, value


def _full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _check_parameter(name: str, parameter: Tensor) -> None:
    if hasattr(parameter, "ds_id"):
        raise NotImplementedError("weights sharded by DeepSpeed ZeRO-3 cannot be exported yet; use ZeRO-2 or FSDP2")
    if not parameter.is_floating_point():
        raise NotImplementedError(
            f"{name} is stored as {parameter.dtype}: quantized training weights cannot be exported to the engine. Load "
            "the model without quantization."
        )


def _check_prompt_learning(model: Any) -> None:
    """What such an adapter trains lies before the prompt, outside of the model that the engine has."""
    adapters = [model.peft_config[name] for name in model.active_adapters if name in model.peft_config]
    for adapter in adapters:
        if adapter.is_prompt_learning:
            raise NotImplementedError(
                f"the engine does not know adapters of type {type(adapter).__name__}, which train tokens or keys and "
                "values before the prompt: use LoRA."
            )


def _check_tied_embeddings(base: Any) -> None:
    """An engine has one tensor for tied embeddings, so training must have one as well."""
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    if not getattr(text, "tie_word_embeddings", False):
        return
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(base, getter, lambda: None)()
        if module is not None and type(module).__module__.startswith("peft."):
            raise NotImplementedError(
                f"the model's input and output embeddings are tied (tie_word_embeddings), but an adapter "
                f"({type(module).__name__}) trains one of them apart. Leave the embeddings out of target_modules and "
                "modules_to_save."
            )


def _has_renamed_weights(model: Any) -> bool:
    """Whether transformers holds this model's weights under other names or shapes than its checkpoint does."""
    if not hasattr(model, "config"):
        return False
    from transformers import core_model_loading

    if not hasattr(core_model_loading, "revert_weight_conversion"):
        return False
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        conversions = get_model_conversion_mapping(model, add_legacy=False)
    return bool(conversions)
