"""vLLM's engine core in a thread, and the client that takes the place of a connection to another process."""

from __future__ import annotations

import asyncio
import collections
import itertools
import logging
import queue
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from vllm import envs
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCore, EngineCoreProc, EngineShutdownState
from vllm.v1.engine.core_client import AsyncMPClient, _process_utility_output
from vllm.v1.engine.exceptions import EngineDeadError

from slipstream.vllm_compat import load, steady
from slipstream.vllm_compat.process import keep_process_group, leave_groups

logger = logging.getLogger(__name__)

_SHUTDOWN_SECONDS = 10.0


class ThreadCore(EngineCoreProc):
    """The engine core with its busy loop, without the sockets.

    Args:
        outputs: Takes what the core sends, by `put_nowait`: (client, outputs) pairs, or `ENGINE_CORE_DEAD`.
    """

    def __init__(self, vllm_config: Any, executor_class: Any, log_stats: bool, outputs: Any) -> None:
        self.input_queue: Any = queue.Queue()
        self.output_queue: Any = outputs
        self.engine_index = 0
        self.engines_running = False
        self.shutdown_state = EngineShutdownState.RUNNING
        self.tensor_ipc_receiver = None
        self.has_coordinator = False
        self.frontend_stats_publish_address = None
        self.publish_dp_lb_stats = False
        self.last_counts = (0, 0)
        self.process_input_queue_block = True
        self.enable_fault_tolerance = False
        self.reject_new_requests = False  # since 0.33

        def executor_failed() -> None:
            self.input_queue.put_nowait((EngineCoreRequestType.EXECUTOR_FAILED, b""))

        # The parent's constructor would shake hands over sockets; its parent's makes the engine.
        EngineCore.__init__(self, vllm_config, executor_class, log_stats, executor_failed)

    def _send_engine_dead(self) -> None:
        self.output_queue.put_nowait(EngineCoreProc.ENGINE_CORE_DEAD)


steady.prepare(ThreadCore, load().__version__)


class ThreadClient(AsyncMPClient):
    """vLLM's asynchronous client, with queues where it has sockets.

    `_core_loop` runs in the thread. All else runs in the event loop, but for `put_nowait`, which the thread calls.
    """

    def __init__(
        self, vllm_config: Any, executor_class: Any, log_stats: bool, renderer: Any = None, **_others: Any
    ) -> None:
        self.vllm_config = vllm_config
        self.resources: Any = SimpleNamespace(engine_dead=False, engine_manager=None, coordinator=None)
        self.engines_running = False
        self.stats_update_address = None
        self.client_count, self.client_index = 1, 0
        self.engine_ranks_managed = [0]
        self.core_engine = (0).to_bytes(2, "little")
        self.core_engines = [self.core_engine]
        self.utility_results: Any = {}
        self.outputs_queue: Any = asyncio.Queue()
        self._renderer = renderer
        self._kv_event_sources: Any = {}
        self._engine_status: Any = {}
        self._call_ids = itertools.count()
        self._arrived: collections.deque[Any] = collections.deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        ready: Future[ThreadCore] = Future()
        arguments = (vllm_config, executor_class, log_stats, self)
        self._thread = threading.Thread(target=_core_loop, args=(ready, arguments), name="EngineCore", daemon=True)
        self._thread.start()
        try:
            self._core = ready.result(envs.VLLM_ENGINE_READY_TIMEOUT_S)
        except TimeoutError:
            raise TimeoutError(
                f"the engine has not started within {envs.VLLM_ENGINE_READY_TIMEOUT_S} s; set "
                "VLLM_ENGINE_READY_TIMEOUT_S to wait longer"
            ) from None
        if hasattr(self, "_start_mm_warmup"):  # since 0.30
            self._start_mm_warmup()

    def shutdown(self, timeout: float | None = None) -> None:
        """End the thread; requests that still run are dropped."""
        if self._thread.is_alive():
            self._core.shutdown_state = EngineShutdownState.REQUESTED
            self._core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
            self._thread.join(timeout or _SHUTDOWN_SECONDS)
            if self._thread.is_alive():
                logger.warning("the engine's thread has not ended within %s s", timeout or _SHUTDOWN_SECONDS)
        self.resources.engine_dead = True

    def put_nowait(self, outputs: Any) -> None:
        """What the core sends. Called in its thread."""
        self._arrived.append(outputs)
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._take)

    def _ensure_output_queue_task(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._take()

    def _take(self) -> None:
        while self._arrived:
            outputs = self._arrived.popleft()
            if outputs == EngineCoreProc.ENGINE_CORE_DEAD:
                self._died()
                continue
            _, outputs = outputs
            if outputs.utility_output:
                _process_utility_output(outputs.utility_output, self.utility_results)
            elif outputs.outputs or outputs.scheduler_stats:
                self.outputs_queue.put_nowait(outputs)

    def _died(self) -> None:
        self.resources.engine_dead = True
        for waiting in self.utility_results.values():
            if not waiting.done():
                waiting.set_exception(EngineDeadError())
        self.utility_results.clear()
        self.outputs_queue.put_nowait(EngineDeadError())

    async def _send_input(self, request_type: Any, request: Any, engine: Any = None) -> None:
        self.ensure_alive()
        self._ensure_output_queue_task()
        if request_type == EngineCoreRequestType.ADD:
            added = request
            try:
                request = self._core.preprocess_add_request(added)
            except Exception:  # noqa: BLE001
                self._core._handle_request_preproc_error(added)  # logs it, and ends the request with an error
                return
        elif request_type == EngineCoreRequestType.ABORT:
            self._core.aborts_queue.put_nowait(request)  # taken in the middle of a step; the other queue keeps order
        self._core.input_queue.put_nowait((request_type, request))

    async def _call_utility_async(self, method: str, *args: Any, engine: Any = None) -> Any:
        self.ensure_alive()
        self._ensure_output_queue_task()
        call = next(self._call_ids)
        future = asyncio.get_running_loop().create_future()
        self.utility_results[call] = future
        self._core.input_queue.put_nowait((EngineCoreRequestType.UTILITY, (self.client_index, call, method, args)))
        return await future


def _core_loop(ready: Future[ThreadCore], arguments: tuple[Any, ...]) -> None:
    """The life of an engine core. It is made here, since devices and threads of operators belong to a thread."""
    joined = dist.is_initialized()
    keep_process_group()  # what vLLM does in its place collects garbage for seconds, before the process ends anyway
    try:
        core = ThreadCore(*arguments)
    except BaseException as error:  # noqa: BLE001
        leave_groups(own_group=not joined)
        ready.set_exception(error)
        return
    ready.set_result(core)
    try:
        core.run_busy_loop()
    except SystemExit:  # how the loop ends when it was asked to
        pass
    except BaseException:
        logger.exception("the engine's thread failed")
        core._send_engine_dead()
    finally:
        core.shutdown()
        leave_groups(own_group=not joined)
