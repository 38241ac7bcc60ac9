"""What trainer and server say to each other: requests as msgpack or JSON, completions as frames of raw arrays.

A token costs eight bytes on the wire and no Python object on either side. Nothing here can run code when it is read.

One frame is a header, then for a completion `tokens` int32 ids, as many float32 log-probabilities if it has them, and
its version runs; all little-endian.

| header | type | a completion | a prompt | the end | an error |
|---|---|---|---|---|---|
| kind | u8 | 1 | 2 | 3 | 4 |
| finish | u8 | 0 stop, 1 length | | | |
| flags | u16 | bit 0: log-probabilities follow | | | |
| runs | u32 | version runs | | | |
| prompt | u32 | index of the request's prompt | the same | | HTTP status |
| sample | u32 | index among the prompt's completions | | | |
| tokens | u32 | length | length | frames sent before | bytes of UTF-8 text |
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np

from slipstream.generation.engine import Sampling
from slipstream.records import Completion

MSGPACK = "application/msgpack"
JSON = "application/json"
FRAMES = "application/x-slipstream-frames"
TRANSPORTS = ("shared_memory", "body", "group")
MODES = ("keep", "wait")

HEADER = struct.Struct("<BBHIIII")
RUN = struct.Struct("<Iq")  # first token of the run, weight version
COMPLETION, PROMPT, END, ERROR = 1, 2, 3, 4
FINISH_REASONS = ("stop", "length")
HAS_LOGPROBS = 1
# A header that says more than this is not ours: nothing is read until memory runs out.
LARGEST_FRAME = 1 << 28


class Message(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """A request or an answer. Unknown fields are errors, so that a misspelt one cannot pass unseen."""


class PromptMessage(Message):
    """One prompt, as token ids (a list, or int32 little-endian bytes), text, or chat messages: one of the three.

    Attributes:
        images: Pictures as PNG (in JSON as base64), beside token ids or text that have one placeholder for each.
        expanded: Token ids that the server's processor must make of prompt and images; others are refused. None: any.
        n: Completions wanted; completion i is sampled with seed `seed + i` (None: unseeded).
        mixture: Share of the reference model in the logits that are sampled from; needs a server with a reference.
        max_tokens: Largest number of tokens of its completions, where that is less than `sampling.max_tokens`.
    """

    ids: bytes | list[int] | None = None
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    n: int = 1
    seed: int | None = None
    mixture: float = 0.0
    max_tokens: int | None = None
    images: list[bytes] = []
    expanded: bytes | list[int] | None = None


class SamplingMessage(Message):
    """`generation.engine.Sampling`, field by field."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: bool = True
    regex: str | None = None
    extra: dict[str, Any] = msgspec.field(default_factory=dict)
    ends: tuple[int, ...] = ()


class GenerateMessage(Message):
    """Body of `POST /generate`.

    Attributes:
        version: The weight version that must serve; None takes any. Another one is refused with 409.
        update: The update that must have brought it, as `CommitReply` names it; None takes any. Two trainers, or a
            server that was started again, may have the same version of different weights.
        chat_template_kwargs: Further variables for the chat template, where prompts are messages.
    """

    prompts: list[PromptMessage]
    sampling: SamplingMessage = msgspec.field(default_factory=SamplingMessage)
    version: int | None = None
    update: str | None = None
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)


class TensorSpec(msgspec.Struct, array_like=True, frozen=True):
    """Name, dtype ("float32", "bfloat16", "float16") and shape of one tensor, under its checkpoint name."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class BeginMessage(Message):
    """Body of `POST /weights/begin`. The answer is a `BeginReply`.

    Attributes:
        version: Version that the weights will have once they are committed.
        tensors: All that will be sent, in order.
        transport: `shared_memory`, `body` (HTTP), or `group` (a process group made by `/communicator`).
        mode: What happens to requests that run at the commit: `keep` pauses them and goes on with the new weights,
            `wait` lets them finish before.
        reference: True replaces the reference model's weights, not the policy's.
    """

    version: int
    tensors: list[TensorSpec]
    transport: str = "shared_memory"
    mode: str = "keep"
    reference: bool = False


class BeginReply(Message):
    """Answer to `BeginMessage`.

    Attributes:
        transaction: Number that the following calls name.
        path: The file to write into (`shared_memory`), which only a client on the same machine can open; its
            first 32 bytes are `nonce`, by which the client knows it. The tensors' layout begins at `offset`.
    """

    transaction: int
    path: str = ""
    nonce: bytes = b""
    offset: int = 0


class CommitMessage(Message):
    """Body of `POST /weights/commit`: `checksums` has one entry a tensor, or one a bucket where they
    came through a process group (`weights.verify.checksum`, `weights.buckets.bucket_checksum`)."""

    transaction: int
    checksums: list[int]


class ProgressMessage(Message):
    """Body of `POST /weights/progress`: weights of this update are on their way, where the server does not see them."""

    transaction: int


class CommitReply(Message):
    """What a commit did: the version that serves now, and for how many seconds generation was stopped.

    Attributes:
        update: The server's name for this update, which no other has.
        reference_missing: Whether a replica lacks the reference model's last weights, and gets no prompts until they
            are sent again.
    """

    version: int
    paused_seconds: float
    update: str
    reference_missing: bool = False


class AbortMessage(Message):
    """Body of `POST /weights/abort`."""

    transaction: int


class CommunicatorMessage(Message):
    """Body of `POST /communicator`: a trainer wants to send weights through a process group in which it is rank 0.

    Attributes:
        backend: `nccl` or `gloo`.
        devices: UUIDs of the accelerators that the trainer computes on, to be compared with the server's.
        timeout: Seconds that any step of an exchange may take.
    """

    backend: str
    devices: list[str] = []
    timeout: float = 300.0


class CommunicatorReply(Message):
    """Answer: `world_size` counts the trainer's rank 0; `group` prefixes the keys of the rendezvous store."""

    world_size: int
    group: str


class ReplicaReport(Message):
    """What a replica's process says of itself (`GET /info` on its socket).

    Attributes:
        state: `ready`, or `stale`: it has no weights of the trainer yet, or a failed update has cost it what it had.
        version: Version that serves; None while stale. 0 before the first update, when it serves what it loaded.
        update: Name of the update that brought it; empty before the first.
        running: Completions that are being sampled or wait for it.
        devices: UUIDs of its accelerators; none on a CPU.
        ranks: Workers, each of which takes part in a process group.
        detail: Why it is stale.
        shares_memory, shares_loopback: Whether all its workers share the server's memory, and its loopback: they do
            unless Ray has put them on other machines.
    """

    state: str
    version: int | None
    running: int
    devices: list[str]
    ranks: int
    max_model_len: int
    dtype: str
    vllm: str
    platform: str
    detail: str = ""
    update: str = ""
    shares_memory: bool = True
    shares_loopback: bool = True


class ReplicaBegin(Message):
    """`POST /weights/begin` to a replica.

    Attributes:
        update: The server's name for this update.
        path, offset: Where shared memory holds the tensors' layout.
    """

    transaction: int
    begin: BeginMessage
    update: str
    path: str = ""
    offset: int = 0


class ReplicaCommit(Message):
    """`POST /weights/commit` to a replica.

    Attributes:
        timeout: Seconds after which nobody waits for the answer any more.
    """

    transaction: int
    checksums: list[int]
    timeout: float = 300.0


class ReplicaCommunicator(Message):
    """`POST /communicator` to a replica: its workers become ranks `first_rank`, `first_rank + 1`, ... of the group.

    Attributes:
        store_url, api_key: Where the rendezvous store is, and the key to it.
        group: Prefix of the keys there.
    """

    backend: str
    first_rank: int
    world_size: int
    group: str
    store_url: str
    api_key: str
    timeout: float


class ReplicaInfo(Message):
    """One replica: `state` is `starting`, `ready`, `stale` (no weights yet, or lost them) or `dead`.

    Attributes:
        ranks: Its workers, each of which takes part in a process group.
        shares_memory: Whether they all share the server's memory. If not, weights reach them through a group alone.
    """

    state: str
    version: int | None = None
    running: int = 0
    devices: list[str] = []
    detail: str = ""
    ranks: int = 0
    shares_memory: bool = True


class ServerInfo(Message):
    """Answer of `GET /server_info`.

    Attributes:
        transaction: The update that is under way.
        update_timeout: Seconds that the server gives its replicas for a step of an update.
    """

    slipstream: str
    vllm: str
    model: str
    dtype: str
    max_model_len: int
    tensor_parallel_size: int
    data_parallel_size: int
    version: int | None
    platform: str
    replicas: list[ReplicaInfo] = []
    transaction: int | None = None
    reference: bool = False
    update_timeout: float = 300.0

    @property
    def shares_memory(self) -> bool:
        """Whether all workers share the server's memory."""
        return all(replica.shares_memory for replica in self.replicas)


M = TypeVar("M", bound=msgspec.Struct)
_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """`message` as msgpack."""
    return _encoder.encode(message)


def decode(body: bytes, kind: type[M], content_type: str = MSGPACK) -> M:
    """A message from msgpack, or from JSON where the content type says so.

    Raises:
        ValueError: it is not one; the message says what is wrong and where.
    """
    media = content_type.partition(";")[0].strip().lower()
    if media not in (MSGPACK, JSON):
        raise ValueError(f"content type {media!r} is not supported; send {MSGPACK} or {JSON}")
    try:
        if media == MSGPACK:
            return msgspec.msgpack.decode(body, type=kind)
        message = msgspec.json.decode(body, type=kind)
        encode(message)  # an integer of more than 64 bits could not be told to anybody else
    except (msgspec.DecodeError, OverflowError) as error:  # ValidationError is a DecodeError
        raise ValueError(f"{kind.__name__}: {error}") from error
    return message


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as int32 little-endian bytes."""
    return np.asarray(ids, dtype="<i4").tobytes()


def unpack_ids(ids: bytes | list[int]) -> list[int]:
    """Token ids from either form.

    Raises:
        ValueError: the number of bytes is no multiple of four.
    """
    if isinstance(ids, bytes):
        if len(ids) % 4:
            raise ValueError(f"ids: {len(ids)} bytes is no multiple of 4 (int32 little-endian)")
        return np.frombuffer(ids, dtype="<i4").tolist()
    return ids


def sampling_message(sampling: Sampling) -> SamplingMessage:
    """`sampling` for the wire."""
    return SamplingMessage(**{name: getattr(sampling, name) for name in SamplingMessage.__struct_fields__})


def sampling_of(message: SamplingMessage) -> Sampling:
    """The engine's `Sampling` of a message."""
    return Sampling(**msgspec.structs.asdict(message))


# Frames ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class CompletionFrame:
    """One finished completion: which it is, and what it is."""

    prompt: int
    sample: int
    completion: Completion


@dataclass(slots=True)
class PromptFrame:
    """The token ids that a text or chat prompt was turned into."""

    prompt: int
    ids: list[int]


class StreamError(RuntimeError):
    """The server could not finish an answer that it had begun. `status` is the HTTP status it would have had."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def completion_frame(
    prompt: int,
    sample: int,
    ids: Any,
    logprobs: Any | None,
    finish_reason: str,
    runs: Sequence[tuple[int, int]],
) -> bytes:
    """A completion as bytes.

    Args:
        prompt, sample: Which completion of the request it is.
        ids: Token ids: a sequence or an int32 array.
        logprobs: One a token, or None.
        finish_reason: "stop" or "length".
        runs: (first token, weight version) of each stretch of tokens that one version sampled, in order.
    """
    ids_array = np.asarray(ids, dtype="<i4")
    parts = [
        HEADER.pack(
            COMPLETION,
            FINISH_REASONS.index(finish_reason),
            0 if logprobs is None else HAS_LOGPROBS,
            len(runs),
            prompt,
            sample,
            len(ids_array),
        ),
        ids_array.tobytes(),
    ]
    if logprobs is not None:
        logprobs_array = np.asarray(logprobs, dtype="<f4")
        if logprobs_array.shape != ids_array.shape:
            raise ValueError(f"{len(logprobs_array)} log-probabilities for {len(ids_array)} tokens")
        parts.append(logprobs_array.tobytes())
    parts += [RUN.pack(*run) for run in runs]
    return b"".join(parts)


def prompt_frame(prompt: int, ids: Sequence[int]) -> bytes:
    """The token ids of a rendered prompt."""
    return HEADER.pack(PROMPT, 0, 0, 0, prompt, 0, len(ids)) + pack_ids(ids)


def end_frame(frames: int) -> bytes:
    """The last frame of a whole answer, after `frames` others: without it, the answer was cut off."""
    return HEADER.pack(END, 0, 0, 0, 0, 0, frames)


def error_frame(status: int, message: str) -> bytes:
    """The last frame of an answer that failed after it had begun."""
    text = message.encode()[:65536]
    return HEADER.pack(ERROR, 0, 0, 0, status, 0, len(text)) + text


class FrameReader:
    """Frames out of a stream of bytes that is cut anywhere.

    Attributes:
        frames: Completion and prompt frames read so far.
        ended: Whether the end frame came.
    """

    def __init__(self) -> None:
        self.frames = 0
        self.ended = False
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[CompletionFrame | PromptFrame]:
        """The frames that `data` completes.

        Raises:
            StreamError: the server reports a failure.
            ValueError: the bytes are not frames, or frames are missing.
        """
        data = self._rest + data if self._rest else data
        at, size, view = 0, len(data), memoryview(data)
        while size - at >= HEADER.size:
            kind, finish, flags, runs, prompt, sample, tokens = HEADER.unpack_from(data, at)
            body = at + HEADER.size
            end = body + body_length(kind, finish, flags & HAS_LOGPROBS, runs, tokens)
            if end > size:
                break
            if self.ended:
                raise ValueError("the answer goes on after its end")
            if kind == COMPLETION:
                self.frames += 1
                # The trainer waits while these lines run, once a completion. Memory is little-endian, as the wire.
                middle, last = body + 4 * tokens, end - runs * RUN.size
                ids = view[body:middle].cast("i").tolist()
                logprobs = array("f", data[middle:last]) if flags & HAS_LOGPROBS else None
                completion = Completion(ids, logprobs, RUN.unpack_from(data, last)[1], FINISH_REASONS[finish])
                if runs > 1:
                    completion.version_runs = tuple(RUN.iter_unpack(view[last:end]))
                yield CompletionFrame(prompt, sample, completion)
            elif kind == PROMPT:
                self.frames += 1
                yield PromptFrame(prompt, unpack_ids(data[body:end]))
            elif kind == ERROR:
                raise StreamError(prompt, data[body:end].decode(errors="replace"))
            else:
                if tokens != self.frames:
                    raise ValueError(f"the answer has {self.frames} frames and says that it had {tokens}")
                self.ended = True
            at = end
        self._rest = data[at:]

    def finish(self) -> None:
        """Raise ValueError unless the answer came whole."""
        if not self.ended:
            raise ValueError(f"the answer was cut off after {self.frames} frames")


def body_length(kind: int, finish: int, has_logprobs: int, runs: int, tokens: int) -> int:
    """Bytes that follow a header."""
    if kind == COMPLETION and runs and finish < len(FINISH_REASONS):  # first: nearly all frames are completions
        length = tokens * (8 if has_logprobs else 4) + runs * RUN.size
    else:
        length = {PROMPT: tokens * 4, ERROR: tokens, END: 0}.get(kind, LARGEST_FRAME + 1)
    if length > LARGEST_FRAME:
        raise ValueError(f"the answer is not a stream of frames (kind {kind}, {tokens} tokens, {runs} runs)")
    return length
