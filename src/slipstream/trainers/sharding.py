"""Models whose weights are divided over the ranks (FSDP2)."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, str_to_bool
from torch import nn
from transformers.integrations.fsdp import is_fsdp_managed_module

from slipstream.environment import variable

if TYPE_CHECKING:
    from slipstream.config import OnlineConfig

# accelerate's and transformers' own variables.
SHARDS = "ACCELERATE_USE_FSDP"
VERSION = "FSDP_VERSION"
LOADS_ON_ONE_RANK = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def check(config: OnlineConfig) -> None:
    """Raise NotImplementedError for a way of dividing weights that does not work here. Call it before models are read.

    A `config` that asks for FSDP in its field `fsdp` counts as well as what `accelerate launch` was told.
    """
    given: Any = config
    if given.fsdp:
        version = int(given.fsdp_plugin_args["fsdp_version"])
        where = "fsdp_config"
    elif _is_set(SHARDS):
        version = int(os.environ.get(VERSION, "1"))
        where = "the accelerate config"
    else:
        return
    if version != 2:
        raise NotImplementedError(f"FSDP version {version} is not supported: set fsdp_version: 2 in {where}.")
    if config.use_transformers_continuous_batching:
        raise NotImplementedError(
            "use_transformers_continuous_batching=True does not go with FSDP, since ranks would wait for each other's "
            "weights: use vLLM, or leave it out."
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the policy's weights are divided, or will be when training begins."""
    return accelerator.distributed_type == DistributedType.FSDP


def check_divided(accelerator: Accelerator, policy: nn.Module) -> None:
    """Raise RuntimeError if the policy is still to be divided: ranks may not have its weights before."""
    if is_sharded(accelerator) and not is_fsdp_managed_module(policy):
        raise RuntimeError(
            "evaluate() before train() does not go with FSDP, which divides the weights when training begins: set "
            "eval_on_start=True."
        )


def prepare_reference(accelerator: Accelerator, reference: nn.Module) -> nn.Module:
    """A frozen model beside the policy, divided as the policy is.

    Every rank needs weights for that on one of them alone: the others may have zeros.
    """
    if is_sharded(accelerator):
        from accelerate.utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, reference)
    return accelerator.prepare_model(reference, evaluation_mode=True)


def whole_models() -> AbstractContextManager[None]:
    """Let `from_pretrained` read all weights on every rank, for models that are not divided.

    Otherwise transformers gives all ranks of a machine but one a model of zeros, to be filled when it is divided.
    """
    return variable(LOADS_ON_ONE_RANK, "false")


def _is_set(name: str) -> bool:
    return bool(str_to_bool(os.environ.get(name, "false")))
