"""What a trainer needs from a generator: six verbs. Trainers never ask which engine they have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from slipstream.records import Completion, Images

if TYPE_CHECKING:
    import torch


# Called with the index of a request and the token ids of its completions when the last of them is there.
OnFinished = Callable[[int, list[list[int]]], None]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. Neutral values switch a filter off.

    Attributes:
        max_tokens: Largest number of tokens a completion may have.
        temperature: Logits are divided by it; 0 is greedy.
        top_p: Nucleus mass kept, 1.0 keeps all.
        top_k: Number of most likely tokens kept, 0 keeps all.
        min_p: Smallest probability kept, relative to the most likely token; 0.0 keeps all.
        repetition_penalty: 1.0 is none.
        logprobs: Whether to return the sampled tokens' log-probabilities.
        regex: Completions must match this expression (structured outputs), or None.
        extra: Further arguments for the engine's own sampling class, by its names.
        ends: Tokens that end a completion beside those that the model's own settings name.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: bool = True
    regex: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    ends: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """Ask for `n` completions of one prompt; completion i is sampled with seed `seed + i` (None: unseeded).

    Attributes:
        mixture: Share of the reference model in the logits sampled from: 0.0 is the policy, 1.0 the reference. Between
            them, log_softmax(mixture * reference + (1 - mixture) * policy). Above 0 needs an engine with a reference.
        max_tokens: Largest number of tokens of its completions, where that is less than the call's; None: the call's.
        images: The prompt's images; None: it has none.
    """

    prompt_ids: Sequence[int]
    n: int = 1
    seed: int | None = None
    mixture: float = 0.0
    max_tokens: int | None = None
    images: Images | None = None


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one weight update moved: `nbytes` bytes in `tensors` tensors within `seconds` seconds.

    For `paused` of these, an engine that samples beside the trainer could not go on. A server names the `update`; with
    `reference_missing` a part of it was started again and needs the reference's weights, too.
    """

    version: int
    nbytes: int
    tensors: int
    seconds: float
    paused: float = 0.0
    update: str = ""
    reference_missing: bool = False


class EngineLostError(RuntimeError):
    """The engine does not answer, or no longer holds the trainer's weights, but may come back: see `recover`."""


class Engine(Protocol):
    """A generator of completions that follows a trainer's weights."""

    version: int | None
    """Version of the weights it holds; None until the first `update_weights`."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """Sample `requests[i].n` completions for each request, in order. Every completion carries `version`.

        `on_finished` is called while others are being sampled, by an engine that knows of some before others.
        """
        ...

    def update_weights(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> SyncReport:
        """Replace the weights by `tensors` (checkpoint names, full tensors), wholly or not at all."""
        ...

    def update_reference(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> SyncReport:
        """Replace the reference's weights, which have no version (0), by `tensors`, wholly or not at all."""
        ...

    def recover(self) -> None:
        """Wait until an engine that was lost can be reached again. It has no weights of the trainer's then."""
        ...

    def sleep(self, level: int = 1) -> None:
        """Free accelerator memory: 1 keeps the weights in host memory, 2 drops them (an update must follow `wake`)."""
        ...

    def wake(self, tags: Sequence[str] | None = None) -> None:
        """Take the memory back: all of it, or in parts, first "weights", then "kv_cache"."""
        ...

    def close(self) -> None:
        """End the engine. It leaves the trainer's process group and random states as they were."""
        ...
