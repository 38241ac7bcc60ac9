"""Scheduling a batch that only decodes, without looking at every sequence in every step.

vLLM's scheduler goes through all running sequences twice a step, in Python: 10 to 30 microseconds for each, which at
512 sequences is longer than a GPU takes for the step of a small model. While nobody can join and every sequence
decodes, the outcome is known before: one token each, a new block of the cache now and then, and an end where a token
ends a sequence or it is long enough. In `steady_batch` that is arithmetic on arrays. A sequence is handed back to
vLLM's own code for its last token, and all of them whenever anything else happens (a new request, an abort, too little
memory).

Nobody is told of the tokens before a sequence ends, so only requests that want nothing but their final output qualify.
What they sample is not added to the prefix cache: hashing it takes longer than scheduling does.
Whoever has to know how many there are asks `tokens_so_far`.
On a GPU with CUDA graphs, what sequences begin with is read once for all of them in these steps (`steady_prefixes`).
Known for vLLM 0.26 to 0.33; in front of another scheduler or engine, and with SLIPSTREAM_STEADY_DECODE=0 in the
environment, `install` leaves everything as it is.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

import numpy as np

from slipstream.vllm_compat import steady_runner, worker_in
from slipstream.vllm_compat.prefix_cache import quicken
from slipstream.vllm_compat.sampled_logprobs import Recorder
from slipstream.vllm_compat.steady_batch import SWITCH, Batch
from slipstream.vllm_compat.steady_runner import SteadyRunner

logger = logging.getLogger(__name__)

VERSIONS = ("0.26.", "0.27.", "0.28.", "0.29.", "0.30.", "0.31.", "0.32.", "0.33.")
"""vLLM's versions whose scheduler was read, and is tested, for what is skipped here."""

SHARE = "SLIPSTREAM_SHARED_DECODE"
"""The environment variable for reading prompts once: 0 turns it off, 1 on, also where it was not measured."""


def install(core: Any, version: str) -> str | None:
    """Let the scheduler of an engine core decode steadily. Returns why not, where it cannot.

    Args:
        core: vLLM's `EngineCore`, in this process, without requests.
        version: Of vLLM.
    """
    scheduler = core.scheduler
    why = _obstacle(scheduler, version)
    if why is None:
        _Steady(scheduler)
    return why


def _obstacle(scheduler: Any, version: str) -> str | None:
    known = {
        importlib.import_module("vllm.v1.core.sched.scheduler").Scheduler,
        importlib.import_module("vllm.v1.core.sched.async_scheduler").AsyncScheduler,
    }
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 says so"
    if not version.startswith(VERSIONS):
        return f"vLLM {version} was not tried"
    if type(scheduler) not in known:
        return f"its scheduler is a {type(scheduler).__name__}"
    if any(
        getattr(scheduler, name, None) is not None for name in ("connector", "ec_connector", "aux_output_connector")
    ):
        return "a connector sees every step"
    if scheduler.num_spec_tokens or scheduler.use_pp or scheduler.log_stats or scheduler.is_encoder_decoder:
        return "it decodes speculatively, in a pipeline, with an encoder, or with statistics"
    if getattr(scheduler, "return_sampling_mask", False):
        return "each token's sampling mask is asked for"
    if scheduler.scheduler_config.prefill_schedule_interval > 1:
        return "prompts are read in some steps only (prefill_schedule_interval), and vLLM's scheduler counts them"
    if getattr(scheduler, "enable_return_routed_experts", False) or scheduler.need_mamba_block_aligned_split:
        return "its model keeps more than keys and values"
    groups = scheduler.kv_cache_config.kv_cache_groups
    full = importlib.import_module("vllm.v1.kv_cache_interface").FullAttentionSpec
    if len(groups) != 1 or type(groups[0].kv_cache_spec) is not full:
        return "not all layers keep keys and values of all tokens"
    parallel = scheduler.parallel_config
    if (
        getattr(parallel, "decode_context_parallel_size", 1) > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1
    ):
        return "sequences are split over ranks"
    return None


def begin(core: Any, version: str, recorder: Recorder | None = None) -> None:
    """Let an engine core decode steadily where that is known to be right, by CUDA graphs where those are (see
    `steady_runner`), and log what it does.

    Args:
        core: As for `install`.
        version: Of vLLM.
        recorder: What records the log-probabilities of its sampled tokens, if anything does.
    """
    if why := install(core, version):
        logger.info("every sequence is scheduled by itself in every step, which is slower, since %s", why)
        return
    worker = worker_in(core.model_executor)
    runner: str | SteadyRunner = "its workers are processes of their own"
    if worker is not None:
        runner = steady_runner.install(worker, version, recorder)
    if isinstance(runner, str):
        logger.info("steady steps: by vLLM's own runner, since %s", runner)
        return
    wanted = os.environ.get(SHARE)
    apart = f"{SHARE}=0 says so" if wanted == "0" else runner.share(anywhere=wanted == "1")
    core.scheduler.schedule.__self__.prefixes = apart is None
    how = "once for all of its completions" if apart is None else f"for each completion, since {apart}"
    logger.info("steady steps: CUDA graphs; a prompt is read %s", how)


def prepare(kind: Any, version: str) -> None:
    """Let engine cores of a class decode steadily where that can be, hash each prompt once, forget caches quickly, and
    answer `tokens_so_far`."""
    make = kind.__init__

    def made(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        quicken(self, version)
        begin(self, version)

    kind.__init__, kind.tokens_so_far = made, tokens_so_far


def tokens_so_far(core: Any) -> dict[str, int]:
    """Tokens that each unfinished request of an engine core has, whether anybody was told of them or not."""
    steady = getattr(core.scheduler.schedule, "__self__", None)
    if isinstance(steady, _Steady):
        steady.leave()
    return {name: request.num_output_tokens for name, request in core.scheduler.requests.items()}


class _Steady:
    """Stands before a scheduler's own methods."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.batch: Batch | None = None
        self.prefixes = False
        """Whether steps say which sequences begin alike."""
        self.unsent: dict[str, list[np.ndarray]] = {}
        """Tokens that nobody was told of, by request."""
        self._schedule, self._update = scheduler.schedule, scheduler.update_from_output
        self._finish, self._reset = scheduler.finish_requests, scheduler.reset_prefix_cache
        scheduler.schedule, scheduler.update_from_output = self.schedule, self.update
        scheduler.finish_requests, scheduler.reset_prefix_cache = self.finish, self.reset

    def schedule(self, *args: Any, **options: Any) -> Any:
        if self.batch is None:
            self.batch = Batch.of(self.scheduler, self.unsent, self.prefixes)
        if self.batch is not None:
            output = self.batch.schedule()
            if output is not None:
                return output
            self.leave()
        return self._schedule(*args, **options)

    def update(self, scheduled: Any, sampled: Any) -> Any:
        if self.batch is not None and self.batch.made(scheduled):
            return self._with_unsent(self.batch.update(scheduled, sampled, self._update))
        told = self._update(scheduled, sampled)
        if self.batch is not None:
            self.batch.drop_finished()
        return self._with_unsent(told)

    def finish(self, *args: Any, **options: Any) -> Any:
        self.leave()
        finished = self._finish(*args, **options)
        for name in self.unsent.keys() - self.scheduler.requests.keys():
            del self.unsent[name]
        return finished

    def reset(self, *args: Any, **options: Any) -> Any:
        self.leave()
        return self._reset(*args, **options)

    def leave(self) -> None:
        """Give all sequences back to vLLM's own code, as if it had had them all the time."""
        batch, self.batch = self.batch, None
        if batch is not None:
            for row in np.flatnonzero(batch.alive):
                batch.settle(int(row))
                batch.requests[row].update_block_hashes()

    def _with_unsent(self, told: dict[int, Any]) -> dict[int, Any]:
        if self.unsent:
            for outputs in told.values():
                for output in outputs.outputs:
                    if output.request_id in self.unsent:
                        _prepend(np.concatenate(self.unsent.pop(output.request_id)), output)
        return told


def _prepend(tokens: np.ndarray, output: Any) -> None:
    output.new_token_ids = tokens["id"].tolist() + output.new_token_ids
    if (later := output.new_logprobs) is not None:
        output.new_logprobs = later._replace(
            logprob_token_ids=np.concatenate([tokens["id"][:, None], later.logprob_token_ids[:, :1]]),
            logprobs=np.concatenate([tokens["logprob"][:, None], later.logprobs[:, :1]]),
            sampled_token_ranks=np.concatenate([tokens["rank"], later.sampled_token_ranks]),
        )
