"""An engine in the trainer's process: starting it, ending it, and the traces it would leave.

| what vLLM does to the process | what becomes of it |
|---|---|
| resets and draws from the random states of torch, CUDA, numpy and Python | `generation.guest.Guest` swaps them |
| overwrites environment variables (`LOCAL_WORLD_SIZE`, `LD_PRELOAD`, ...) | `Guest` restores all but `VLLM_*` |
| on CPU, makes `torch.set_num_threads`, streams, events, pinning no-ops | `Guest`: in force inside engine calls only |
| lowers the number of torch threads, sets float32 matmul precision | `Guest` swaps them |
| destroys the default process group when an engine ends | `keep_process_group` |
| running a model by transformers' code, decorates the trainer's own model class | `keep_model_classes` |
| compiles parts of its sampler, on CPU | `uncompile_sampler` |
| freezes the objects alive at start out of garbage collection | undone when the engine ends |
| keeps the error of an import that failed, and with it the frames of whoever imported it | `forget_callers` |
"""

from __future__ import annotations

import functools
import gc
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from slipstream.vllm_compat import load, on_cpu, steady, worker_in
from slipstream.vllm_compat.model import check_graphs, check_updatable, forget_model
from slipstream.vllm_compat.prefix_cache import quicken
from slipstream.vllm_compat.sampled_logprobs import Recorder

logger = logging.getLogger(__name__)


def start(options: dict[str, Any]) -> tuple[Any, bool]:
    """Make a `vllm.LLM` in this process.

    Returns:
        It, and whether vLLM had to create the default process group, which then ends with it.

    Raises:
        NotImplementedError: The model has layers whose weights vLLM cannot replace correctly here, or its CUDA graphs
            would be wrong.
        RuntimeError: The environment tells vLLM to use a process of its own.
    """
    import torch.distributed as dist

    vllm = load()
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
        raise RuntimeError(
            "vllm_mode='colocate' runs the engine in the trainer's process, but VLLM_ENABLE_V1_MULTIPROCESSING="
            f"{os.environ.get('VLLM_ENABLE_V1_MULTIPROCESSING')}. Unset it, or set it to 0."
        )
    keep_model_classes()  # whatever model_impl says: vLLM runs architectures without code of its own that way, too
    if on_cpu():
        uncompile_sampler()
    keep_process_group()
    joined = dist.is_available() and dist.is_initialized()
    if joined and options.get("distributed_executor_backend") == "external_launcher":
        os.environ.setdefault("RANK", str(dist.get_rank()))
        os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
        if on_cpu():
            tell_teams_apart()
    with forget_callers(), warnings.catch_warnings():
        # vLLM reads every attribute of every loaded module once, deprecated ones as well.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            llm = vllm.LLM(**options)
        except BaseException:
            leave_groups(own_group=dist.is_initialized() and not joined)
            raise
    own_group = dist.is_initialized() and not joined
    try:
        check_updatable(worker_of(llm))
        check_graphs(worker_of(llm))
    except BaseException:
        shut_down(llm, own_group)
        raise
    quicken(llm.llm_engine.engine_core.engine_core, vllm.__version__)
    return llm, own_group


@functools.cache
def tell_teams_apart() -> None:
    """Let the shared memory of a team of CPU engines be named after its run: vLLM calls that of all runs the same.

    A second run on the machine would be refused, or read what the first one writes.
    """
    owner = importlib.import_module("vllm.distributed.device_communicators.cpu_communicator")._CPUSHMDistributed
    plain = owner.make_group_name
    owner.make_group_name = staticmethod(lambda communicator: f"{plain(communicator)}-{os.environ.get('MASTER_PORT')}")


def decode_steadily(llm: Any, recorder: Recorder | None = None) -> None:
    """`steady.begin` for an engine that `start` made."""
    steady.begin(llm.llm_engine.engine_core.engine_core, load().__version__, recorder)


def shut_down(llm: Any, own_group: bool) -> None:
    """End what `start` began. The caller drops its own references to `llm` to free the memory."""
    forget_model(worker_of(llm))
    llm.llm_engine.engine_core.shutdown()
    leave_groups(own_group=own_group)


def team_group() -> Any:
    """Process group (CPU) of the engines that hold one copy of the weights together."""
    return importlib.import_module("vllm.distributed.parallel_state").get_tp_group().cpu_group


def worker_of(llm: Any) -> Any:
    """The worker of an in-process engine: it has `vllm_config` and `model_runner`."""
    return worker_in(llm.llm_engine.model_executor)


def release_memory() -> None:
    """Give unused blocks of the accelerator's allocator back."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def release_pools() -> None:
    """Drop the memory pools of an engine that could sleep and has ended.

    The next engine would replace them in an order that frees an allocator before the pool that calls it, which aborts
    the process.
    """
    cumem = sys.modules.get("vllm.device_allocator.cumem")
    allocator = cumem and cumem.CuMemAllocator.instance
    if allocator:
        allocator.release_pools()


@contextmanager
def telling(llm: Any, finished: Callable[[int, Any], None]) -> Iterator[None]:
    """Within, `llm.generate` calls `finished` with the number of a prompt and vLLM's answer to it when it is there.

    vLLM numbers requests in the order of their prompts, and gives all answers back at the end alone.
    """
    engine, first = llm.llm_engine, llm.request_counter.counter
    step = engine.step

    def tell() -> Any:
        outputs = step()
        for output in outputs:
            if output.finished:
                finished(int(output.request_id) - first, output)
        return outputs

    engine.step = tell
    try:
        yield
    finally:
        del engine.step


def abort_all(llm: Any) -> None:
    """Drop every unfinished request."""
    requests = list(llm.llm_engine.output_processor.request_states)
    if requests:
        llm.llm_engine.abort_request(requests, internal=True)


def reset_caches(llm: Any) -> None:
    """Drop everything computed with earlier weights: cached prefixes, multimodal inputs, encoder outputs."""
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM could not reset its prefix cache: requests are still running")
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()


def keep_process_group() -> None:
    """From now on, ending an engine leaves torch.distributed's default process group alone.

    An engine that found no process group creates one of its own (one member, loopback). It stays while the engine
    lives and the engine's owner ends it. A trainer that uses torch.distributed initializes it before the engine.
    """
    core: Any = importlib.import_module("vllm.v1.engine.core")
    core.cleanup_dist_env_and_memory = functools.partial(leave_groups, own_group=False)


@contextmanager
def forget_callers() -> Iterator[None]:
    """Afterwards, vLLM's modules keep no frames of those that called them.

    They keep the error of an import that failed, such as torchcodec's. Its traceback holds all frames up to the trainer
    in whose `__init__` vLLM was imported: that trainer, its model and its optimizer would never be freed.
    """
    try:
        yield
    finally:
        modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "vllm"]
        for kept in [value for module in modules for value in list(vars(module).values())]:
            # Of stand-ins for packages that are missing, only the type can be asked.
            while issubclass(type(kept), BaseException):
                kept.__traceback__, kept = None, kept.__context__


def leave_groups(*, own_group: bool) -> None:
    """End vLLM's process groups, and the default one if it is vLLM's own."""
    import torch.distributed as dist

    state: Any = importlib.import_module("vllm.distributed.parallel_state")
    gc.unfreeze()
    state.destroy_model_parallel()
    if state._WORLD is not None:
        state._WORLD.destroy()
        state._WORLD = None
    if hasattr(state, "_NODE_COUNT"):
        state._NODE_COUNT = None
    if own_group and dist.is_initialized():
        dist.destroy_process_group()


def uncompile_sampler() -> None:
    """Use the plain originals of two small sampler functions that vLLM compiles at the first request (20 s)."""
    sampler = importlib.import_module("vllm.v1.sample.sampler")
    for module_name, name in (
        ("vllm.v1.sample.ops.logprobs", "batched_count_greater_than"),
        ("vllm.v1.sample.ops.topk_topp_sampler", "compiled_random_sample"),
    ):
        module = importlib.import_module(module_name)
        compiled = getattr(module, name, None)
        original = getattr(compiled, "_torchdynamo_orig_callable", None)
        if original is not None:
            for holder in (module, sampler):
                if getattr(holder, name, None) is compiled:
                    setattr(holder, name, original)


def keep_model_classes() -> None:
    """Let the trainer's models of a class that vLLM's transformers backend decorates work as before.

    The backend makes `__init__` and `__call__` of the architecture's class expect an engine's configuration, for every
    instance in the process. From now on only instances made by an engine take the decorated ways.
    """
    backend: Any = importlib.import_module("vllm.model_executor.models.transformers.base")
    original = backend.support_torch_compile
    if hasattr(original, "by_instance"):
        return
    from vllm.config import get_current_vllm_config_or_none

    def support_torch_compile(*args: Any, **kwargs: Any) -> Callable[[type], type]:
        decorate = original(*args, **kwargs)

        def apply(cls: Any) -> type:
            if getattr(cls.__init__, "by_instance", False):
                return cls
            plain_init, plain_call = cls.__init__, cls.__call__
            decorate(cls)
            engine_init, engine_call = cls.__init__, cls.__call__

            @functools.wraps(plain_init)
            def init(self: Any, *args: Any, **kwargs: Any) -> None:
                made_by_engine = get_current_vllm_config_or_none() is not None
                (engine_init if made_by_engine else plain_init)(self, *args, **kwargs)

            @functools.wraps(plain_call)
            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                # vLLM's own `__init__` leaves this mark.
                return (engine_call if "do_not_compile" in self.__dict__ else plain_call)(self, *args, **kwargs)

            init.by_instance = True  # type: ignore[attr-defined]
            cls.__init__, cls.__call__ = init, call
            return cls

        return apply

    support_torch_compile.by_instance = True  # type: ignore[attr-defined]
    backend.support_torch_compile = support_torch_compile
