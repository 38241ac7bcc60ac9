"""Checks of the requests of one call, and completions out of vLLM's answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from slipstream.generation.engine import Request, Sampling
from slipstream.records import Completion
from slipstream.vllm_compat import token_prompt

if TYPE_CHECKING:
    from slipstream.serving.wire import PromptMessage, SamplingMessage


def mixture_of(requests: Sequence[Request | PromptMessage], *, has_reference: bool) -> float:
    """The mixture of the requests of one call, 0.0 if there are none.

    Raises:
        ValueError: They differ, are not in [0, 1], or are above 0 where the engine has no reference.
    """
    shares = {request.mixture for request in requests} or {0.0}
    if len(shares) > 1:
        raise ValueError(
            f"generate: the requests of one call have mixtures {', '.join(map(str, sorted(shares)))}; the engine "
            "samples from one distribution at a time: make a call for each"
        )
    [mixture] = shares
    if not 0 <= mixture <= 1:
        raise ValueError(f"generate: mixture={mixture!r} is not allowed: a number from 0 (policy) to 1 (reference)")
    if mixture > 0 and not has_reference:
        raise ValueError(
            f"generate: mixture={mixture!r} samples from a reference model, which this engine was made without: give "
            "`reference` to build_engine, or set mixture=0"
        )
    return mixture


def token_limit(request: Request | PromptMessage, sampling: Sampling | SamplingMessage) -> int:
    """Tokens that a completion of the request may have: the smaller of its own limit and the call's."""
    return sampling.max_tokens if request.max_tokens is None else min(request.max_tokens, sampling.max_tokens)


def check_lengths(requests: Sequence[Request], sampling: Sampling, limit: int) -> None:
    """Raise ValueError if a prompt is empty, or does not fit into `limit` tokens with a completion."""
    for index, request in enumerate(requests):
        length = len(request.prompt_ids)
        if length == 0:
            raise ValueError(f"generate: request {index} has an empty prompt; give at least one token")
        asked = token_limit(request, sampling)
        if asked < 1:
            raise ValueError(f"generate: request {index} has max_tokens={asked}; give it at least 1")
        if length + asked > limit:
            raise ValueError(
                f"generate: request {index} has {length} prompt tokens; with max_tokens={asked} they "
                f"exceed the engine's max_model_len={limit}. Shorten the prompt, lower max_completion_length, or "
                "raise vllm_max_model_length."
            )


def prompt_of(request: Request, salt: str | None) -> Any:
    """A request's prompt as vLLM takes it."""
    if request.images is None:
        return token_prompt(list(request.prompt_ids), salt)
    return token_prompt(list(request.images.engine_ids), salt, request.images.pictures)


def check_prompt(index: int, request: Request, seen: Sequence[int]) -> None:
    """Raise RuntimeError unless the token ids that vLLM has `seen` of a prompt with images are the trainer's.

    Then its processor has cut the images into other pieces than the trainer's, whose log-probabilities would be those
    of another prompt.
    """
    if request.images is not None and (why := difference(seen, request.prompt_ids)):
        raise RuntimeError(
            f"generate: request {index} {why}: leave processing_class out, give the same ones to vLLM "
            "(vllm_engine_kwargs={'mm_processor_kwargs': {...}}), or save the processor beside the model."
        )


def difference(seen: Sequence[int], own: Sequence[int]) -> str | None:
    """Where the token ids that vLLM sees of a prompt with images are not the trainer's `own`; None: nowhere."""
    if list(seen) == list(own):
        return None
    differ = (i for i, (theirs, ours) in enumerate(zip(seen, own, strict=False)) if theirs != ours)
    place = next(differ, min(len(seen), len(own)))
    return (
        f"has images, and vLLM's processor makes {len(seen)} tokens of its prompt where the trainer's makes "
        f"{len(own)}; from token {place} on they differ. The model would be trained on other prompts than it answers. "
        "Give both processors the same settings"
    )


def ids_of(request: Request, samples: Sequence[Any], sampling: Sampling) -> list[list[int]]:
    """Token ids of the completions of a request, of what vLLM answered."""
    samples = list(samples) * (request.n if sampling.temperature == 0 else 1)
    return [list(sample.token_ids) for sample in samples]


def completions_of(
    index: int,
    request: Request,
    samples: Sequence[Any],
    sampling: Sampling,
    version: int,
    logps: Callable[[Any, list[int]], list[float]] | None = None,
) -> list[Completion]:
    """The completions of request `index`.

    Args:
        index: Of the request, for messages.
        request: The request.
        samples: What vLLM answered: outputs with ids, a finish reason, and log-probabilities if they were asked for.
        sampling: How they were sampled.
        version: Of the weights that sampled them.
        logps: Gives the log-probabilities of a sample's token ids where they are kept apart; None: the sample has them.

    Raises:
        RuntimeError: A completion is missing, ended in another way than by a stop or its length, or lacks
            log-probabilities.
    """
    if sampling.temperature == 0:
        samples = list(samples) * request.n
    if len(samples) != request.n:
        raise RuntimeError(f"generate: vLLM gave {len(samples)} of request {index}'s {request.n} completions")
    completions = []
    for sample in samples:
        if sample.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"generate: vLLM ended a completion of request {index} by {sample.finish_reason!r}")
        ids = list(sample.token_ids)
        logprobs = None
        if sampling.logprobs:
            logprobs = list(sample.logprobs.logprobs) if logps is None else logps(sample, ids)
        if logprobs is not None and len(logprobs) != len(ids):
            raise RuntimeError(f"generate: vLLM gave {len(logprobs)} log-probabilities for {len(ids)} tokens")
        completions.append(Completion(ids, logprobs, version, sample.finish_reason))
    return completions
