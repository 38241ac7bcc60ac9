"""vLLM in the trainer's own process: the same device, one Python process, weights handed over by reference."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from slipstream import vllm_compat
from slipstream.generation.engine import OnFinished, Request, Sampling, SyncReport
from slipstream.generation.guest import Guest
from slipstream.generation.requests import (
    check_lengths,
    check_prompt,
    completions_of,
    ids_of,
    mixture_of,
    prompt_of,
)
from slipstream.generation.sleeping import SleepState
from slipstream.generation.team import check_team, ranks, share_requests
from slipstream.generation.vllm_options import check_sampling, engine_options, sampling_params
from slipstream.records import Completion
from slipstream.vllm_compat import check_sleep_supported, mixture, process, sampled_logprobs
from slipstream.weights.plan import WeightUpdateError
from slipstream.weights.transports import in_place

if TYPE_CHECKING:
    import torch

    from slipstream.weights.plan import Plan

logger = logging.getLogger(__name__)
_alive: weakref.WeakSet[ColocateEngine] = weakref.WeakSet()


class ColocateEngine:
    """A `vllm.LLM` in this process that follows the trainer's weights.

    The process stays the trainer's: random states, environment, threads and torch's settings are swapped around engine
    calls (`Guest`). One engine can be alive at a time. If torch.distributed is used, initialize it before the engine:
    vLLM creates a process group of one member when it finds none, and that group lives until `close`.

    Args:
        model: Name or path of the model whose architecture and tokenizer the engine loads. Its weights serve only after
            the first `update_weights`.
        dtype: "float32", "bfloat16" or "float16".
        max_model_len: Longest prompt plus completion, in tokens; None: the model's own limit.
        gpu_memory_utilization: Share of the accelerator's memory the engine may take.
        tensor_parallel_size: Processes of this run, one after the other by rank, whose devices one copy of the model is
            spread over. They make every call together; each gets the completions of its own requests.
        model_impl: "vllm", "transformers" or "auto": which implementation of the model vLLM runs.
        max_num_seqs: Most sequences sampled at the same time; None: vLLM's choice.
        seed: Seed of unseeded requests. Ranks that sample different prompts need different ones.
        enable_sleep_mode: Whether `sleep` can be used.
        trust_remote_code: Whether code from the model's repository may run.
        revision: Branch, tag or commit of `model`.
        reference: Whether to hold a second model, the reference, for requests with a mixture above 0. A token then
            takes twice the cache, and CUDA graphs are of the models' pieces alone.
        steady_decode: Whether steps in which every sequence only gets its next token are scheduled for all of them at
            once (see `steady`), where that is known to be right. False: vLLM goes through them one by one.
        fast_logprobs: Whether the sampled tokens' log-probabilities are gathered on the device and fetched once a call
            (see `sampled_logprobs`), where that is known to be right. False: vLLM hands them on, token by token.
        engine_kwargs: Further arguments of `vllm.LLM`, by its names.

    Attributes:
        version: Version of the policy's weights that serve; None before the first update, after a level 2 sleep, and
            after an update that failed half way.
        timings: Where the time of the last update went.

    Raises:
        ImportError: vLLM is missing.
        ValueError: An option is unknown to vLLM, or set twice; or the number of processes is no multiple of
            `tensor_parallel_size`.
        NotImplementedError: vLLM cannot hold two of this model (see `mixture`).
        RuntimeError: vLLM's version is not supported, another engine is alive in this process, or sleep mode is asked
            for where vLLM cannot sleep.
    """

    def __init__(
        self,
        *,
        model: str,
        dtype: str,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.3,
        tensor_parallel_size: int = 1,
        model_impl: str = "vllm",
        max_num_seqs: int | None = None,
        seed: int = 0,
        enable_sleep_mode: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
        reference: bool = False,
        fast_logprobs: bool = True,
        steady_decode: bool = True,
        engine_kwargs: dict[str, Any] | None = None,
    ) -> None:
        check_team(tensor_parallel_size)
        if enable_sleep_mode:
            check_sleep_supported()
        fields = {
            "model": str(model), "dtype": dtype, "max_model_len": max_model_len, "max_num_seqs": max_num_seqs,
            "gpu_memory_utilization": gpu_memory_utilization, "tensor_parallel_size": tensor_parallel_size,
            "model_impl": model_impl, "seed": seed,
            "enable_sleep_mode": enable_sleep_mode, "trust_remote_code": trust_remote_code, "revision": revision,
        }  # fmt: skip
        options = engine_options(fields, engine_kwargs, reference=reference)
        if tensor_parallel_size > 1 or (ranks() > 1 and not vllm_compat.on_cpu()):
            # Every rank has one worker on its own device; this executor takes the device from LOCAL_RANK.
            options.setdefault("distributed_executor_backend", "external_launcher")
        if _alive:
            raise RuntimeError(
                "another ColocateEngine is alive in this process: close it before making a new one. A trainer's ends "
                "with trainer.close(), and not when the trainer is deleted."
            )
        self.version: int | None = None
        self.timings: in_place.Timings | None = None
        self._why_unusable: str | None = "no weights yet; call update_weights first"
        self._has_reference = reference
        self._why_no_reference: str | None = "no reference weights yet; call update_reference first"
        self._plans: dict[str, Plan] = {}
        self._sleep = SleepState(enabled=enable_sleep_mode)
        self._guest = Guest()
        with self._guest.inside():
            if reference:
                mixture.install()
            self._llm, own_group = process.start(options)
            # Also runs when the engine is collected, or still open when Python exits, or if what follows fails.
            self._end = weakref.finalize(self, _end, self._llm, self._guest, own_group)
            self._recorder = sampled_logprobs.install(process.worker_of(self._llm)) if fast_logprobs else None
            if steady_decode:
                process.decode_steadily(self._llm, self._recorder)
        self._team = process.team_group() if tensor_parallel_size > 1 else None
        _alive.add(self)

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus completion, in tokens."""
        self._sleep.check_open("max_model_len")
        return int(self._llm.llm_engine.model_config.max_model_len)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """Sample `requests[i].n` completions for each request, in order; `on_finished` hears of each while others run.

        Completion i of a request is sampled with seed `seed + i`, whatever else is in the call. On CPU the same seed
        gives the same tokens; on a GPU rounding depends on the batch, so that tokens may differ. All requests of a call
        have the same mixture.

        Raises:
            RuntimeError: The engine has no weights of the trainer, or none of the reference that the requests ask for;
                it sleeps, or is closed; vLLM lost a completion, or makes other tokens of a prompt with images.
            ValueError: A prompt and `max_tokens` do not fit into `max_model_len`, an option is unknown, or mixtures
                differ or need a reference that is not there.
        """
        self._sleep.check_generate()
        own = slice(0, len(requests))
        if self._team is not None:
            everyones = share_requests(requests, sampling, self._team)
            requests, own = everyones.requests, slice(everyones.begin, everyones.end)
        share = mixture_of(requests, has_reference=self._has_reference)
        if self.version is None:
            raise RuntimeError(f"generate: {self._why_unusable}")
        if share > 0 and self._why_no_reference is not None:
            raise RuntimeError(f"generate: {self._why_no_reference}")
        if not requests:  # no rank of the team has one
            return []
        check_sampling(sampling)
        check_lengths(requests, sampling, self.max_model_len)
        recorder = self._recorder if sampling.logprobs else None
        asked = sampling if recorder is None else dataclasses.replace(sampling, logprobs=False)
        with self._guest.inside():
            if self._has_reference:
                self._llm.collective_rpc(mixture.set_mixture, args=(share,))
            salt = mixture.cache_salt(share)
            prompts = [prompt_of(request, salt) for request in requests]
            params = [sampling_params(request, asked) for request in requests]
            telling: Any = contextlib.nullcontext()
            if on_finished is not None:
                tell = on_finished

                def told(index: int, answer: Any) -> None:
                    if own.start <= index < own.stop:
                        tell(index - own.start, ids_of(requests[index], answer.outputs, sampling))

                telling = process.telling(self._llm, told)
            try:
                with telling, recorder.recording() if recorder else contextlib.nullcontext():
                    outputs = self._llm.generate(prompts, params, use_tqdm=False)
            except BaseException:
                process.abort_all(self._llm)  # or the next call would be given this one's leftovers
                raise
            recorded = recorder.take() if recorder else None
        if len(outputs) != len(requests):
            raise RuntimeError(f"generate: vLLM answered {len(outputs)} of {len(requests)} requests")
        for index, (request, output) in enumerate(zip(requests, outputs, strict=True)):
            check_prompt(index, request, output.prompt_token_ids)
        return [
            completions_of(
                index,
                request,
                output.outputs,
                sampling,
                self.version,
                functools.partial(recorded.of_sample, output.request_id) if recorded else None,
            )
            for index, (request, output) in enumerate(zip(requests[own], outputs[own], strict=True))
        ]

    def update_weights(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> SyncReport:
        """Replace the policy's weights by `tensors` (checkpoint names, full tensors), wholly or not at all.

        Names, shapes, coverage and finiteness are checked before anything is touched; afterwards what the engine holds
        is compared with what was sent. Prefix, multimodal and encoder caches are emptied.

        Raises:
            WeightUpdateError: Refused: the engine still serves the version it had.
            LoadFailedError: Loading failed half way, or the comparison did: `generate` raises until an update succeeds.
        """
        self._sleep.check_update()
        try:
            report = self._load(mixture.POLICY, version, tensors)
        except BaseException as error:
            if _touched(error):
                self._lose_weights(f"the last weight update failed ({error}); a whole update repairs it")
            raise
        self.version, self._why_unusable = version, None
        return report

    def update_reference(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> SyncReport:
        """Replace the reference's weights by `tensors`, as `update_weights` does the policy's, which stay.

        Raises:
            ValueError: The engine was made without a reference.
            WeightUpdateError: Refused: the reference is what it was.
            LoadFailedError: Loading failed half way: requests with a mixture raise until an update succeeds.
        """
        self._sleep.check_update("update_reference")
        if not self._has_reference:
            raise ValueError(
                "update_reference: the engine was made without a reference model: give `reference` to build_engine"
            )
        try:
            report = self._load(mixture.REFERENCE, 0, tensors)
        except BaseException as error:
            if _touched(error):
                self._why_no_reference = f"the last update of the reference failed ({error}); a whole one repairs it"
            raise
        self._why_no_reference = None
        return report

    def _load(self, part: str, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> SyncReport:
        begin = time.perf_counter()
        sent = list(tensors)
        with self._guest.inside():
            arguments = (sent, self._plans.get(part), part)
            [(self._plans[part], self.timings)] = self._llm.collective_rpc(in_place.update, args=arguments)
            process.reset_caches(self._llm)
        return SyncReport(version, sum(t.nbytes for _, t in sent), len(sent), time.perf_counter() - begin)

    def recover(self) -> None:
        """Raise RuntimeError: it cannot be lost without this process."""
        raise RuntimeError("recover: an engine in this process cannot be lost without it")

    def sleep(self, level: int = 1) -> None:
        """Free accelerator memory: 1 keeps the weights in host memory, 2 drops them (an update must follow `wake`)."""
        self._sleep.check_sleep(level)
        with self._guest.inside():
            self._llm.sleep(level=level)
        self._sleep.fell_asleep(level)
        if level == 2:
            self._lose_weights("a level 2 sleep dropped the weights; call update_weights after wake")
            self._why_no_reference = "a level 2 sleep dropped the reference's weights; call update_reference after wake"

    def wake(self, tags: Sequence[str] | None = None) -> None:
        """Take memory back: all that is asleep, or the parts in `tags`.

        `wake(["weights"])`, `update_weights`, `wake(["kv_cache"])` takes the cache's memory only after the update.
        """
        waking = self._sleep.check_wake(tags)
        # Sleeping memory was the trainer's to use: what its allocator keeps of it would be missing now.
        process.release_memory()
        with self._guest.inside():
            self._llm.wake_up(list(waking))
        self._sleep.woke(waking)

    def close(self) -> None:
        """End the engine and free its memory. Closing twice is closing once."""
        if self._sleep.closed:
            return
        if self._sleep.asleep:
            # vLLM's allocator unmaps what it frees: of memory that is asleep, and so unmapped already, it makes an
            # error that stays, and the next engine of this process cannot sleep.
            try:
                self.wake()
            except RuntimeError as error:
                logger.warning("close: the sleeping engine's memory could not be woken to free it: %s", error)
        self._sleep.closed = True
        self.version, self._llm, self._recorder = None, None, None
        self._end()
        _alive.discard(self)
        gc.collect()
        process.release_memory()
        process.release_pools()

    def _lose_weights(self, why: str) -> None:
        self.version, self._why_unusable = None, why


def _touched(error: BaseException) -> bool:
    """Whether a failed update may have changed the engine. A refusal comes before anything is touched."""
    return not isinstance(error, WeightUpdateError) or isinstance(error, in_place.LoadFailedError)


def _end(llm: Any, guest: Guest, own_group: bool) -> None:
    with guest.inside():
        process.shut_down(llm, own_group)
