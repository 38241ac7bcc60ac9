"""The client of a generation server: prompts in, completions out, and weights in."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from slipstream.generation.engine import OnFinished, Request, Sampling, SyncReport
from slipstream.pictures import to_png
from slipstream.records import Completion, Images
from slipstream.serving import wire
from slipstream.serving.connection import Connection, RefusedError, ServerError
from slipstream.serving.machine import url_of

if TYPE_CHECKING:
    import torch

    from slipstream.serving.sender import Sender

__all__ = ["RefusedError", "ServerError", "VLLMClient"]


class VLLMClient:
    """A client of `slipstream vllm-serve`. Its calls may come from several threads at once.

    Only reading calls are repeated when a connection breaks. A call raises ConnectionError if the server cannot be
    reached, TimeoutError if it is silent for too long, PermissionError if it wants another key, `RefusedError` (a
    ValueError) if it refuses what it was asked, and `ServerError` if it fails.

    Args:
        base_url: Of the server, as `http://host:port`; None: made of `host` and `server_port`.
        host: Name or address; 0.0.0.0 means this machine.
        server_port: Port of the server.
        group_port: Taken for TRL's sake. Nothing listens on a port of its own here: the members of a process group
            find each other through the server.
        connection_timeout: Seconds to wait until the server is ready; 0.0 tries once.
        api_key: The server's key; None: SLIPSTREAM_API_KEY, or the one that a server of the same user on the same
            machine keeps in a file.
        timeout: Seconds that the server may be silent while it generates.

    Raises:
        ConnectionError: no server is ready within `connection_timeout`.
        PermissionError: the server wants another key.
    """

    def __init__(
        self,
        base_url: str | None = None,
        host: str = "0.0.0.0",
        server_port: int = 8000,
        group_port: int = 51216,
        connection_timeout: float = 0.0,
        api_key: str | None = None,
        *,
        timeout: float = 1800.0,
    ) -> None:
        self._connection = Connection(base_url or url_of(host, server_port), api_key, timeout)
        self.base_url = self._connection.url
        self._sender_made: Sender | None = None
        self._collected: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()
        try:
            self.wait(connection_timeout)
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> VLLMClient:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # What the server is -------------------------------------------------------------------------------------------

    def wait(self, timeout: float) -> wire.ServerInfo:
        """Wait until the server is ready; 0 asks once. Raises ConnectionError when `timeout` seconds are over."""
        return self._connection.wait(timeout)

    def health(self) -> bool:
        """Whether the server is ready to generate; False while it starts."""
        try:
            self._connection.call("GET", "/health")
        except ServerError as error:
            if error.status != 503:
                raise
            return False
        return True

    def server_info(self) -> wire.ServerInfo:
        """What the server is: model, limits, version of its weights, replicas."""
        return self._connection.get("/server_info", wire.ServerInfo)

    def get_world_size(self) -> int:
        """Number of the server's workers: tensor parallel times data parallel."""
        info = self.server_info()
        return info.tensor_parallel_size * info.data_parallel_size

    # Completions --------------------------------------------------------------------------------------------------

    def stream(
        self, requests: Sequence[Request], sampling: Sampling, version: int | None = None, update: str | None = None
    ) -> Iterator[tuple[int, int, Completion]]:
        """Yield (index of the request, index of the sample, completion) as completions are finished.

        Args:
            version: That must serve; None takes any. Another one is an error of status 409.
            update: That must have brought it, as `SyncReport` names it: versions alone do not tell trainers apart.
        """
        message = wire.GenerateMessage(
            prompts=[
                wire.PromptMessage(
                    n=r.n, seed=r.seed, mixture=r.mixture, max_tokens=r.max_tokens, **_prompt(r.prompt_ids, r.images)
                )
                for r in requests
            ],
            sampling=wire.sampling_message(sampling),
            version=version,
            update=update,
        )
        for frame in self._frames(message):
            assert isinstance(frame, wire.CompletionFrame)
            yield frame.prompt, frame.sample, frame.completion

    def sample(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        version: int | None = None,
        update: str | None = None,
        on_finished: OnFinished | None = None,
    ) -> list[list[Completion]]:
        """Sample `requests[i].n` completions for each request, in order; see `stream`.

        `on_finished` is called with a request's index and its completions' token ids when the last of them is there.
        """
        if not requests:
            return []
        table: list[list[Completion | None]] = [[None] * request.n for request in requests]
        for prompt, sample, completion in self.stream(requests, sampling, version, update):
            row = table[prompt]
            row[sample] = completion
            if on_finished is not None and None not in row:
                on_finished(prompt, [c.ids for c in row if c is not None])
        return _complete(table)

    def generate(
        self,
        prompts: list[str] | list[list[int]],
        n: int = 1,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_tokens: int = 16,
        logprobs: int | None = 0,
        structured_outputs_regex: str | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        images: list[list[Any] | None] | None = None,
    ) -> dict[str, Any]:
        """Sample `n` completions of each prompt, given as text or as token ids.

        Args:
            top_k: Number of most likely tokens kept; 0 or -1 keeps all.
            logprobs: 0 for those of the sampled tokens, None for none.
            structured_outputs_regex: Completions match it.
            generation_kwargs: Further fields of vLLM's SamplingParams, by its names.
            images: For each prompt its PIL images (None: it has none), for which it has a placeholder each.

        Returns:
            `prompt_ids`, a list of token ids a prompt; `completion_ids`, one a completion, `n` a prompt one after the
            other; `logprobs` and `logprob_token_ids`, a list a completion of one list a token, which holds the sampled
            token's log-probability and id (None without log-probabilities).
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts={prompts!r} would be read letter by letter: give a list of prompts.")
        if images is not None and len(images) != len(prompts):
            raise ValueError(f"images has {len(images)} entries for {len(prompts)} prompts: give each a list or None.")
        pictures = [[to_png(image) for image in own or ()] for own in images or [None] * len(prompts)]
        mixed: Sequence[str | list[int]] = prompts
        messages = [
            wire.PromptMessage(n=n, images=own, **({"text": p} if isinstance(p, str) else {"ids": wire.pack_ids(p)}))
            for p, own in zip(mixed, pictures, strict=True)
        ]
        sampling = _sampling(
            repetition_penalty, temperature, top_p, top_k, min_p, max_tokens, logprobs, structured_outputs_regex,
            generation_kwargs,
        )  # fmt: skip
        return self._answer(wire.GenerateMessage(prompts=messages, sampling=sampling))

    def chat(
        self,
        messages: list[list[dict[str, Any]]],
        n: int = 1,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_tokens: int = 16,
        logprobs: int | None = 0,
        structured_outputs_regex: str | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Sample `n` answers to each conversation; as `generate`.

        Args:
            messages: Conversations, each a list of messages with `role` and `content`.
            chat_template_kwargs: Further variables for the chat template.
        """
        sampling = _sampling(
            repetition_penalty, temperature, top_p, top_k, min_p, max_tokens, logprobs, structured_outputs_regex,
            generation_kwargs,
        )  # fmt: skip
        prompts = [wire.PromptMessage(messages=conversation, n=n) for conversation in messages]
        return self._answer(
            wire.GenerateMessage(prompts=prompts, sampling=sampling, chat_template_kwargs=chat_template_kwargs or {})
        )

    # Weights ------------------------------------------------------------------------------------------------------

    def init_communicator(self, device: int | str | torch.device = 0, transport: str | None = None) -> None:
        """Decide how weights travel, and connect trainer and server where that needs a connection.

        Args:
            device: That the trainer computes on: a number is an accelerator's, or the CPU where there is none.
            transport: "group" (NCCL between accelerators, gloo between CPUs), "shared_memory" (one machine, one user)
                or "body" (HTTP). None: a group between accelerators, and to workers on several machines; else shared
                memory, and HTTP where trainer and server do not share it.

        Raises:
            ConnectionError: the server was lost, or its workers did not join the process group.
            ValueError: the transport does not reach all workers, or trainer and server are on the same accelerator.
        """
        self._sender().connect(device, transport)

    def update_weights(
        self,
        version: int,
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        specs: Sequence[wire.TensorSpec] | None = None,
        mode: str = "keep",
        reference: bool = False,
    ) -> SyncReport:
        """Replace the server's weights, wholly or not at all.

        Args:
            version: Of the new weights.
            tensors: Every weight under its checkpoint name.
            specs: What `tensors` will be, where it is an iterator that must not be held in memory as a whole; their
                types are what is sent. None: 16-bit types and small float32 tensors are sent as they are, others in
                the server's type.
            mode: "keep" pauses running requests and continues them with the new weights, "wait" finishes them first.
            reference: Whether these are the weights of the reference model.

        Raises:
            ConnectionError: the server, or the way to it, was lost; the message says what serves now.
            WeightUpdateError: the server refused them, and serves what it did.
        """
        return self._sender().push(version, tensors, specs, mode, reference)

    def update_named_param(self, name: str, weights: torch.Tensor) -> None:
        """Keep a copy of a weight, in host memory, for the update that `reset_prefix_cache` sends."""
        self._collected[name] = weights.detach().to("cpu", copy=True)

    def update_model_params(self, model: torch.nn.Module) -> None:
        """Send all weights of a model as one update; LoRA adapters are merged into copies."""
        from slipstream.weights.export import named_tensors

        self.update_weights(self._next_version(), named_tensors(model))
        self._collected = {}

    def reset_prefix_cache(self) -> None:
        """Send what `update_named_param` has collected as one update; without any, empty the prefix cache.

        Weights that could not be sent are kept for the next call.
        """
        if self._collected:
            self.update_weights(self._next_version(), list(self._collected.items()))
            self._collected = {}
        else:
            self._connection.call("POST", "/reset_prefix_cache")

    def close_communicator(self) -> None:
        """Leave the process group, if weights travel through one."""
        if self._sender_made is not None:
            self._sender_made.disconnect()

    def close(self) -> None:
        """Close all connections. The server goes on."""
        if self._sender_made is not None:
            self._sender_made.close()
        self._connection.close()

    def _sender(self) -> Sender:
        with self._lock:
            if self._sender_made is None:
                from slipstream.serving.sender import Sender  # imports torch, which generating does not need

                self._sender_made = Sender(self._connection)
            return self._sender_made

    def _next_version(self) -> int:
        return (self.server_info().version or 0) + 1

    def _frames(self, message: wire.GenerateMessage) -> Iterator[wire.CompletionFrame | wire.PromptFrame]:
        reader = wire.FrameReader()
        try:
            for data in self._connection.stream("/generate", message):
                yield from reader.feed(data)
            reader.finish()
        except wire.StreamError as error:
            kind = RefusedError if error.status in (400, 413) else ServerError
            raise kind(error.status, f"{self.base_url}/generate: {error}") from error
        except RefusedError:
            raise
        except ValueError as error:  # what came is no answer, or not a whole one
            raise ConnectionError(f"{self.base_url}/generate: {error}") from error

    def _answer(self, message: wire.GenerateMessage) -> dict[str, Any]:
        prompt_ids: list[list[int] | None] = [None] * len(message.prompts)
        table: list[list[Completion | None]] = [[None] * prompt.n for prompt in message.prompts]
        for index, prompt in enumerate(message.prompts):
            if prompt.ids is not None:
                prompt_ids[index] = wire.unpack_ids(prompt.ids)
        for frame in self._frames(message):
            if isinstance(frame, wire.PromptFrame):
                prompt_ids[frame.prompt] = frame.ids
            else:
                table[frame.prompt][frame.sample] = frame.completion
        completions = [completion for row in _complete(table) for completion in row]
        with_logprobs = message.sampling.logprobs
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [c.ids for c in completions],
            "logprobs": [[[v] for v in c.logprobs or ()] for c in completions] if with_logprobs else None,
            "logprob_token_ids": [[[i] for i in c.ids] for c in completions] if with_logprobs else None,
        }


def _prompt(ids: Sequence[int], images: Images | None) -> dict[str, Any]:
    if images is None:
        return {"ids": wire.pack_ids(ids)}
    pictures = [to_png(picture) for picture in images.pictures]
    return {"ids": wire.pack_ids(images.engine_ids), "expanded": wire.pack_ids(ids), "images": pictures}


def _sampling(
    repetition_penalty: float,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    max_tokens: int,
    logprobs: int | None,
    regex: str | None,
    extra: dict[str, Any] | None,
) -> wire.SamplingMessage:
    if logprobs not in (0, None):
        raise ValueError(f"logprobs={logprobs!r} is not allowed: 0 gives those of the sampled tokens, None gives none.")
    return wire.SamplingMessage(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=max(top_k, 0), min_p=min_p,
        repetition_penalty=repetition_penalty, logprobs=logprobs is not None, regex=regex, extra=extra or {},
    )  # fmt: skip


def _complete(table: list[list[Completion | None]]) -> list[list[Completion]]:
    """The table, if nothing is missing from it."""
    missing = [(prompt, sample) for prompt, row in enumerate(table) for sample, c in enumerate(row) if c is None]
    if missing:
        raise ConnectionError(f"the server gave no completion for (prompt, sample) {missing[:8]}")
    return table  # type: ignore[return-value]
