"""Our sampling and engine options in vLLM's terms. Names that vLLM does not know are refused before anything starts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Set
from typing import Any

from slipstream import vllm_compat
from slipstream.generation.engine import Request, Sampling
from slipstream.generation.requests import token_limit


def names(text: str) -> frozenset[str]:
    """The words of `text`."""
    return frozenset(text.split())


ENGINE_FIELDS = names(
    "model dtype max_model_len gpu_memory_utilization tensor_parallel_size model_impl max_num_seqs seed "
    "enable_sleep_mode trust_remote_code revision"
)
"""Engine options that have a field of their own in the config."""

SAMPLING_FIELDS = names(
    "n seed max_tokens temperature top_p top_k min_p repetition_penalty logprobs flat_logprobs output_kind"
)
"""Sampling options that have a field of their own, or that the engine needs to set."""

_CPU_CACHE_LIMIT = 2 << 30  # bytes; vLLM fills its cache with zeros at start, about a second a GiB
_CPU_BLOCK = 128  # tokens in a cache block on CPU


def check_names(field: str, given: Iterable[str], known: Set[str], own: frozenset[str]) -> None:
    """Raise ValueError if one of `given` is not among `known` (naming close matches), or among `own`."""
    for name in given:
        if name in own:
            raise ValueError(f"{field}: {name!r} has a field of its own; set it there and leave it out of {field}")
        if name not in known:
            near = difflib.get_close_matches(name, known - own, n=3)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"{field}: there is no option {name!r}.{hint}")


def engine_options(
    fields: Mapping[str, Any],
    extra: Mapping[str, Any] | None,
    *,
    reference: bool = False,
    source: str = "vllm_engine_kwargs",
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, or of vLLM's asynchronous engine.

    Args:
        fields: Values of `ENGINE_FIELDS`; None leaves an option to vLLM.
        extra: The user's further options.
        reference: Whether the engine has a reference model beside the policy.
        source: Where the user gave `extra`, for messages.

    Raises:
        ValueError: An option is unknown to this vLLM, set twice, or at odds with what training or a reference needs.
    """
    extra = dict(extra or {})
    check_names(source, extra, vllm_compat.engine_option_names(), ENGINE_FIELDS)
    if extra.setdefault("logprobs_mode", "processed_logprobs") != "processed_logprobs":
        raise ValueError(
            f"{source}: logprobs_mode={extra['logprobs_mode']!r}, but training compares log-probabilities "
            "under the distribution that was sampled from: leave it at 'processed_logprobs'"
        )
    if extra.get("quantization"):
        raise ValueError(
            f"{source}: quantization={extra['quantization']!r}: an engine takes the training weights as they are; "
            "leave quantization out"
        )
    options = {**extra, **{name: value for name, value in fields.items() if value is not None}}
    options.setdefault("use_tqdm_on_load", False)
    if reference:
        _add_reference(options, source)
    if vllm_compat.on_cpu():
        options.setdefault("enforce_eager", True)
        # A prompt that is cut in two between steps draws a token too many, which vLLM takes back from a seeded
        # generator by its offset; generators on the CPU have none, and the engine dies.
        options.setdefault("enable_chunked_prefill", False)
        if "kv_cache_memory_bytes" not in options:
            options["kv_cache_memory_bytes"] = cpu_cache_bytes(options)
    return options


def _add_reference(options: dict[str, Any], source: str) -> None:
    if not options.setdefault("enforce_eager", vllm_compat.on_cpu()):
        # A graph of the whole model would repeat the branch it was captured in, whatever the mixture is by then.
        compilation = options.get("compilation_config") or {}
        graphs = compilation.get("cudagraph_mode", "PIECEWISE") if isinstance(compilation, dict) else compilation
        if graphs not in ("PIECEWISE", "NONE"):
            raise ValueError(
                f"{source}: compilation_config={compilation!r}, but an engine that samples from the reference as well "
                "can have CUDA graphs of the models' pieces alone: give {'cudagraph_mode': 'PIECEWISE'} or leave it out"
            )
        options["compilation_config"] = {**compilation, "cudagraph_mode": graphs}
    if options.get("speculative_config"):
        raise ValueError(f"{source}: speculative_config does not go with sampling from the reference: leave it out")
    options["additional_config"] = {**(options.get("additional_config") or {}), vllm_compat.REFERENCE_OPTION: True}


def cpu_cache_bytes(options: Mapping[str, Any]) -> int:
    """Size of the key-value cache on CPU: vLLM's default is nearly all memory, filled with zeros at start.

    Room for `max_num_seqs` sequences of full length, at most 2 GiB and a quarter of the free memory, but always enough
    for one sequence. With a reference a token has keys and values in both models.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        options["model"], revision=options.get("revision"), trust_remote_code=options.get("trust_remote_code", False)
    ).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 4 if options.get("dtype") in ("float32", "float") else 2
    length = options.get("max_model_len") or config.max_position_embeddings
    models = 2 if (options.get("additional_config") or {}).get(vllm_compat.REFERENCE_OPTION) else 1
    block = _CPU_BLOCK * 2 * models * config.num_hidden_layers * heads * width * size
    sequence = -(-length // _CPU_BLOCK) * block
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # One block is vLLM's own.
    return block + max(sequence, min(sequence * options.get("max_num_seqs", 128), _CPU_CACHE_LIMIT, free // 4))


def sampling_params(request: Request, sampling: Sampling) -> Any:
    """`vllm.SamplingParams` for one request. A greedy request asks for one completion, since all would be the same.

    Raises:
        ValueError: an option has a value of a wrong type. vLLM has further errors for values that are out of range.
    """
    options = dict(sampling.extra)
    if sampling.regex is not None:
        options["structured_outputs"] = {"regex": sampling.regex}
    if isinstance(options.get("structured_outputs"), Mapping):  # as YAML and clients have it
        options["structured_outputs"] = vllm_compat.constraint(options["structured_outputs"])
    if sampling.ends:
        options["stop_token_ids"] = [*(options.get("stop_token_ids") or ()), *sampling.ends]
    # Text is made only when a stop string must be found in it.
    options.setdefault("detokenize", bool(options.get("stop")))
    try:
        params = vllm_compat.load().SamplingParams(
            n=request.n if sampling.temperature > 0 else 1,
            seed=request.seed,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            logprobs=0 if sampling.logprobs else None,  # 0: the sampled token's alone
            flat_logprobs=True,  # one list instead of an object a token
            output_kind=vllm_compat.final_only(),
            **options,
        )
    except (TypeError, AttributeError, AssertionError) as error:  # it compares values before it looks at their types
        raise ValueError(
            f"sampling options {options} have a value of a type that vLLM does not take: {type(error).__name__} {error}"
        ) from error
    limit_tokens(params, token_limit(request, sampling))
    return params


def limit_tokens(params: Any, most: int) -> None:
    """Let `vllm.SamplingParams` end after `most` tokens, also where a completion would have to be longer."""
    params.max_tokens, params.min_tokens = most, min(params.min_tokens, most)


def check_sampling(sampling: Sampling) -> None:
    """Raise ValueError if `sampling.extra` has an option that vLLM's SamplingParams lacks, or one with a field here."""
    check_names("generation_kwargs", sampling.extra, vllm_compat.sampling_option_names(), SAMPLING_FIELDS)
