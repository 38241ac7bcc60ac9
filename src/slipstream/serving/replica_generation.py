"""Sampling in a replica: requests are checked, sampled one completion at a time, and streamed as they finish."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from slipstream.checks import number
from slipstream.generation.engine import Request, Sampling
from slipstream.generation.requests import difference, token_limit
from slipstream.generation.vllm_options import check_sampling, limit_tokens, sampling_params
from slipstream.pictures import all_from_png
from slipstream.rollouts.prompts import PromptRenderer
from slipstream.serving import wire
from slipstream.serving.asking import OTHERS
from slipstream.serving.limits import characters
from slipstream.vllm_compat import async_engine, token_prompt
from slipstream.vllm_compat.mixture import cache_salt

_MOST_SEED = 2**63 - 1  # of a generator of torch
_ADDED_AT_A_TIME = 32  # before other tasks have their turn
# What is not a variable of the chat template, but would replace it, pad its text, ...
_NO_VARIABLES = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {"tools", "documents"}


@dataclass(slots=True)
class Job:
    """One completion that is sampled.

    Attributes:
        id: Of the engine's request.
        prompt: Index of its prompt in the request.
        samples: Which of the prompt's completions it is: several for a greedy prompt.
        given: The prompt as the engine takes it.
        mixture: Share of the reference that it is sampled with.
        params: vLLM's sampling parameters.
        runs: (first token, version) of each stretch of tokens so far.
        update: That must have brought the weights; None takes any.
        output: The engine's queue for it; None until it was added.
        replaced: Whether other weights came before its first token: its runs do not tell.
    """

    id: str
    prompt: int
    samples: Sequence[int]
    given: Any
    mixture: float
    params: Any
    runs: list[tuple[int, int]]
    update: str | None = None
    output: Any = None
    replaced: bool = False

    def switch(self, version: int, tokens: int) -> None:
        """From now on `version` samples; there are `tokens`."""
        if tokens == self.runs[-1][0]:
            self.runs.pop()
        self.replaced |= tokens == 0
        self.runs.append((tokens, version))


@dataclass(slots=True)
class Answer:
    """What is sent for one request: frames that are ready, and the tasks that make the others.

    Attributes:
        turn: Of the request; ends once all is sampled, although a slow client may not have read it.
    """

    ready: list[bytes]
    left: int
    turn: ExitStack
    frames: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    error: bytes = b""
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Generation:
    """Samples completions with an engine.

    Args:
        engine: vLLM's asynchronous engine.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._jobs: dict[str, Job] = {}
        self._ids = itertools.count()
        self._vocabulary = int(engine.model_config.get_vocab_size())
        # Long texts take seconds. A tokenizer is one thread's at a time, and vLLM uses its own in the event loop.
        self._tokenizing = ThreadPoolExecutor(1, "slipstream-tokenizer")
        self._tokenizer = copy.deepcopy(engine.get_tokenizer())
        self._longest_token = max(map(len, self._tokenizer.get_vocab()))
        self.max_model_len = int(engine.model_config.max_model_len)

    @property
    def mixes(self) -> bool:
        """Whether what is sampled now has the reference in it."""
        return any(job.mixture > 0 for job in self._jobs.values())

    async def switched(self, version: int) -> None:
        """The weights that serve are those of `version`, from the next token on. Call it while nothing is sampled, and
        after `begin` has learned of it: jobs may begin meanwhile."""
        added = {job.id for job in self._jobs.values() if job.output is not None}
        counts = await async_engine.tokens_so_far(self._engine)
        for job in self._jobs.values():
            if job.id in counts or job.id not in added:  # others have all their tokens
                job.switch(version, counts.get(job.id, 0))

    async def begin(self, message: wire.GenerateMessage, serving: Callable[[], int]) -> tuple[list[Job], list[bytes]]:
        """Check a request and give it to the engine.

        Args:
            serving: The version that serves it, asked once its prompts are read; it may raise.

        Returns:
            Its jobs, and the frames of prompts that came as text or messages.

        Raises:
            ValueError: it is wrong; nothing is sampled. vLLM has further errors (`async_engine.request_errors`).
        """
        frames: list[bytes] = []
        jobs: list[Job] = []
        sampling = wire.sampling_of(message.sampling)
        base = self._params(sampling)
        if wrong := sorted(_NO_VARIABLES & message.chat_template_kwargs.keys()):
            raise ValueError(
                f"chat_template_kwargs: {', '.join(wrong)} cannot be given: only variables of the template"
            )
        renderer = PromptRenderer(self._tokenizer, message.chat_template_kwargs)
        read = [await self._read(p, f"prompt {i}", renderer) for i, p in enumerate(message.prompts)]
        version = serving()  # from here to where the jobs are known, nothing is waited for
        for index, (prompt, (ids, given)) in enumerate(zip(message.prompts, read, strict=True)):
            where = f"prompt {index}"
            self._check(prompt, ids, sampling, where)
            if prompt.ids is None or (prompt.images and prompt.expanded is None):
                frames.append(wire.prompt_frame(index, ids))
            greedy = sampling.temperature == 0
            for sample in range(1 if greedy else prompt.n):
                params = copy.copy(base)
                limit_tokens(params, token_limit(prompt, sampling))
                params.seed = None if prompt.seed is None else prompt.seed + sample
                samples = range(prompt.n) if greedy else (sample,)
                job_id, runs = f"c{next(self._ids)}", [(0, version)]
                jobs.append(Job(job_id, index, samples, given, prompt.mixture, params, runs, message.update))
        self._jobs.update((job.id, job) for job in jobs)
        try:
            for count, job in enumerate(jobs, 1):
                job.output = await self._engine.add_request(job.id, dict(job.given), job.params)
                if count % _ADDED_AT_A_TIME == 0:
                    await asyncio.sleep(0)
        except BaseException:
            await self.drop(jobs)
            raise
        return jobs, frames

    async def stream(self, jobs: list[Job], frames: list[bytes], turn: ExitStack) -> AsyncGenerator[bytes, None]:
        """The answer, in pieces: each has all that was ready. Ends with an end frame, or with an error frame.

        Closed before its end, it takes what is unfinished back from the engine. `turn` is closed when all is sampled.
        """
        answer = Answer(list(frames), len(jobs), turn, len(frames))
        answer.changed.set()
        answer.tasks = [asyncio.create_task(self._sample(job, answer)) for job in jobs]
        try:
            while answer.left or answer.ready:
                await answer.changed.wait()
                answer.changed.clear()
                ready, answer.ready = answer.ready, []
                if answer.error:
                    yield b"".join(ready) + answer.error
                    return
                if ready:
                    yield b"".join(ready)
            yield wire.end_frame(answer.frames)
        finally:
            for task in answer.tasks:
                task.cancel()
            await self.drop(jobs)

    async def drop(self, jobs: list[Job]) -> None:
        """Take jobs back that are unfinished."""
        unfinished = [job.id for job in jobs if self._jobs.pop(job.id, None) is not None and job.output is not None]
        if unfinished and not self._engine.errored:
            await self._engine.abort(unfinished)

    async def _sample(self, job: Job, answer: Answer) -> None:
        try:
            output = await job.output.get()
            self._jobs.pop(job.id, None)
            made = _frames(job, output.outputs[0])
            answer.ready += made
            answer.frames += len(made)
            answer.left -= 1
            if not answer.left:
                answer.turn.close()
        except wire.StreamError as error:
            answer.error = wire.error_frame(error.status, str(error))
        except Exception as error:  # noqa: BLE001
            answer.error = wire.error_frame(503, f"the engine failed: {type(error).__name__}: {error}")
        finally:
            answer.changed.set()

    def _params(self, sampling: Sampling) -> Any:
        """vLLM's parameters for `sampling`, to be copied for each completion."""
        number("max_tokens", sampling.max_tokens, least=1, integer=True)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            number(name, getattr(sampling, name), least=0)
        check_sampling(sampling)
        params = sampling_params(Request((), n=1), sampling)
        async_engine.check_types(params)
        params.skip_clone = True  # the engine may keep what it is given: every completion has a copy of its own
        return params

    async def _read(self, prompt: wire.PromptMessage, where: str, renderer: PromptRenderer) -> tuple[list[int], Any]:
        """Token ids of a prompt, as the model sees them, and the prompt as the engine takes it."""
        ids = await self._prompt_ids(prompt, where, renderer)
        if not prompt.images:
            return ids, token_prompt(ids, cache_salt(prompt.mixture))
        if prompt.mixture > 0:
            raise ValueError(f"{where}: mixture={prompt.mixture} does not go with images")
        read = functools.partial(all_from_png, prompt.images, where)
        pictures = await asyncio.get_running_loop().run_in_executor(self._tokenizing, read)
        try:
            given = await async_engine.with_pictures(self._engine, ids, pictures)
        except Exception as error:  # whatever a model's processor does where placeholders and images do not agree
            raise ValueError(
                f"{where}: vLLM cannot process it with its {len(pictures)} images ({type(error).__name__}: {error})"
            ) from error
        seen = list(given["prompt_token_ids"])
        if prompt.expanded is not None and (why := difference(seen, wire.unpack_ids(prompt.expanded))):
            raise ValueError(
                f"{where} {why}: leave processing_class out, start the server with the same ones "
                "(--mm-processor-kwargs), or save the processor beside the model."
            )
        return seen, given

    async def _prompt_ids(self, prompt: wire.PromptMessage, where: str, renderer: PromptRenderer) -> list[int]:
        given = [value for value in (prompt.ids, prompt.text, prompt.messages) if value is not None]
        if len(given) != 1:
            raise ValueError(f"{where} has {len(given)} of ids, text and messages; give one of them")
        if prompt.ids is not None:
            return wire.unpack_ids(prompt.ids)
        most = self.max_model_len * self._longest_token
        if (length := characters(given[0])) > most:
            raise ValueError(
                f"{where} has {length} characters; max_model_len={self.max_model_len} tokens, none of more than "
                f"{self._longest_token} characters, cannot hold more than {most}. Shorten the prompt, or start the "
                "server with a larger --max-model-len."
            )
        try:
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, renderer.encode, given[0], where)
        except ValueError:
            raise
        except Exception as error:  # whatever a template does of messages that it was not written for
            raise ValueError(
                f"{where}: the chat template cannot render it ({type(error).__name__}: {error})"
            ) from error

    def _check(self, prompt: wire.PromptMessage, ids: list[int], sampling: Sampling, where: str) -> None:
        if not ids:
            raise ValueError(f"{where} is empty; give at least one token")
        lowest, highest = (int(found) for found in (np.min(ids), np.max(ids)))
        if lowest < 0 or highest >= self._vocabulary:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"{where} has the token id {wrong}; the model's go from 0 to {self._vocabulary - 1}")
        asked = token_limit(prompt, sampling)
        if len(ids) + asked > self.max_model_len:
            raise ValueError(
                f"{where} has {len(ids)} tokens; with max_tokens={asked} they exceed the server's "
                f"max_model_len={self.max_model_len}. Shorten the prompt, lower max_tokens, or start the server with a "
                "larger --max-model-len."
            )
        number(f"{where}: n", prompt.n, least=1, integer=True)
        if prompt.seed is not None:
            number(f"{where}: seed", prompt.seed, least=0, most=_MOST_SEED - prompt.n, integer=True)


def _frames(job: Job, output: Any) -> list[bytes]:
    """A finished completion as frames, one a sample."""
    if job.replaced and job.update is not None:
        raise wire.StreamError(409, OTHERS.format(version=job.runs[0][1]))
    if output.finish_reason not in wire.FINISH_REASONS:
        raise wire.StreamError(503, f"the engine ended a completion of prompt {job.prompt} by {output.finish_reason!r}")
    logprobs = None if output.logprobs is None else output.logprobs.logprobs
    return [
        wire.completion_frame(job.prompt, sample, output.token_ids, logprobs, output.finish_reason, job.runs)
        for sample in job.samples
    ]
