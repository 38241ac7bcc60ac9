"""vLLM's asynchronous engine: in a thread of this process where that is faster, in processes of vLLM's elsewhere.

vLLM's own `AsyncLLM` sends every step's tokens through msgpack and a ZMQ socket to another process. On a CPU that costs
a fifth of the speed, and importing everything twice. A thread gets the same objects by reference. Everything above
the connection (requests, aborting, pausing, collective calls, the OpenAI routes) is vLLM's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slipstream.lifetime import die_with_parent
from slipstream.vllm_compat import load, logprobs_at_once, on_cpu, steady, token_prompt
from slipstream.vllm_compat.process import uncompile_sampler

logger = logging.getLogger(__name__)

# What the engine in a thread builds on, as (module, class, attribute). A vLLM that lacks one gets its own processes.
_NEEDED = (
    ("vllm.v1.engine.core", "EngineCoreProc", "run_busy_loop _handle_request_preproc_error preprocess_add_request"),
    ("vllm.v1.engine.core_client", "AsyncMPClient", "_send_input _call_utility_async _ensure_output_queue_task"),
    ("vllm.v1.engine.core_client", "AsyncMPClient", "call_utility_async"),
    ("vllm.v1.engine.core", "EngineShutdownState", "REQUESTED"),
    ("vllm.v1.engine", "EngineCoreRequestType", "WAKEUP"),
)


def start(options: Mapping[str, Any]) -> Any:
    """Make an `AsyncLLM`. It may be called before an event loop runs, from the main thread.

    Args:
        options: Arguments of `vllm.AsyncEngineArgs`.

    Raises:
        Exception: What vLLM raises where it cannot start.
    """
    vllm = load()
    from vllm.v1.engine.async_llm import AsyncLLM

    logprobs_at_once.install()
    arguments = vllm.AsyncEngineArgs(**{"disable_log_stats": True, **options})
    if runs_in_thread(options):
        uncompile_sampler()
        wires = _engine_in_thread()
    else:
        wires = _engine_processes_die_with_us()
    with wires:
        return AsyncLLM.from_engine_args(arguments, usage_context=_usage())


def runs_in_thread(options: Mapping[str, Any]) -> bool:
    """Whether `start(options)` runs the engine in a thread: on CPU, with one worker, if vLLM's internals fit."""
    if not on_cpu() or any(options.get(f"{kind}_parallel_size", 1) != 1 for kind in ("tensor", "pipeline", "data")):
        return False
    missing = [
        f"{module}.{owner}.{name}"
        for module, owner, names in _NEEDED
        for name in names.split()
        if not hasattr(getattr(importlib.import_module(module), owner, None), name)
    ]
    if missing:
        logger.warning("the engine runs in a process of its own, since vLLM lacks %s", ", ".join(missing))
    return not missing


async def tokens_so_far(engine: Any) -> dict[str, int]:
    """Tokens that each request has, by request id, of those that were added before and have not ended."""
    counts = await engine.engine_core.call_utility_async("tokens_so_far")
    states = engine.output_processor.request_states
    return {states[name].external_req_id: count for name, count in counts.items() if name in states}


async def with_pictures(engine: Any, ids: list[int], pictures: Sequence[Any]) -> Any:
    """A prompt of token ids with a placeholder for each of `pictures`, processed: what `add_request` takes, with the
    token ids that the model sees as `prompt_token_ids`.

    Raises:
        ValueError: The model takes text alone. vLLM has further errors (`request_errors`).
    """
    if not engine.model_config.is_multimodal_model:
        raise ValueError("images are given, and the server's model takes text alone")
    [made] = await engine.renderer.render_cmpl_async([token_prompt(ids, None, pictures)])
    return made


async def pause(engine: Any, mode: str) -> None:
    """Stop sampling, and forget what was computed with the weights so far: cached prefixes, images, encoder outputs.

    `AsyncLLM.pause_generation` does the same and then sleeps for 20 ms, so that its callers have heard of all tokens;
    ours asks the core (`tokens_so_far`).

    Args:
        engine: The engine.
        mode: "keep" lets requests wait until generation is resumed, "wait" waits for them to end.
    """
    await engine.renderer.clear_mm_cache_async()
    await engine.engine_core.pause_scheduler_async(mode=mode, clear_cache=True)


async def abort_all(engine: Any) -> None:
    """Drop every unfinished request: each ends with the finish reason "abort"."""
    if requests := list(engine.output_processor.request_states):
        await engine.abort(requests, internal=True)


def request_errors() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that is wrong: a new family of errors since 0.30, ValueError before."""
    own = getattr(importlib.import_module("vllm.exceptions"), "VLLMClientError", ValueError)
    return ValueError, own


def check_types(params: Any) -> None:
    """Raise ValueError if an option has a value of another type than vLLM declares: a step would fail on it."""
    import msgspec

    try:
        made = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=type(params))
    except (msgspec.ValidationError, TypeError) as error:
        raise ValueError(f"sampling: {error}") from error
    for name in params.__struct_fields__:  # an object was made of a dictionary here; the engine has the dictionary
        declared = type(getattr(made, name))
        if isinstance(getattr(params, name), dict) and declared is not dict:
            raise ValueError(f"sampling: Expected `{declared.__name__}`, got `dict` - at `$.{name}`")


def platform() -> str:
    """What vLLM computes on: "cuda", "cpu", ..."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def running(engine: Any) -> int:
    """Completions that are being sampled or wait for it."""
    return int(engine.output_processor.get_num_unfinished_requests())


def _usage() -> Any:
    from vllm.usage.usage_lib import UsageContext

    # vLLM's choice of batch sizes follows it: that of a server on CPU, 128 sequences, is half that of `vllm.LLM`.
    return UsageContext.LLM_CLASS


@contextlib.contextmanager
def _engine_in_thread() -> Iterator[None]:
    """`AsyncLLM`s made inside are connected to an engine core in a thread."""
    from slipstream.vllm_compat.thread_core import ThreadClient

    client: Any = importlib.import_module("vllm.v1.engine.async_llm").EngineCoreClient
    original = client.__dict__["make_async_mp_client"]
    client.make_async_mp_client = staticmethod(ThreadClient)
    try:
        yield
    finally:
        client.make_async_mp_client = original


@contextlib.contextmanager
def _engine_processes_die_with_us() -> Iterator[None]:
    """Engine processes started inside end with this one. (Their workers run our extension, which sees to itself.)"""
    core: Any = importlib.import_module("vllm.v1.engine.core").EngineCoreProc
    original = core.__dict__["run_engine_core"]
    # A forked child would find the replacement where it looks for the original.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    level = logging.getLogger("slipstream").getEffectiveLevel()
    core.run_engine_core = staticmethod(functools.partial(_run_engine_core, level))
    try:
        yield
    finally:
        core.run_engine_core = original


def _run_engine_core(log_level: int, *args: Any, **kwargs: Any) -> None:
    """vLLM's, in a new process, which says what it does steady steps by as loudly as the one that started it."""
    die_with_parent()
    own, handler = logging.getLogger("slipstream"), logging.StreamHandler()
    own.setLevel(log_level)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    own.addHandler(handler)
    core = importlib.import_module("vllm.v1.engine.core").EngineCoreProc
    steady.prepare(core, load().__version__)
    core.run_engine_core(*args, **kwargs)
