"""What a request may ask for: bodies are read up to a size, and numbers are checked before a replica sees them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from fastapi import HTTPException, Request

from slipstream.checks import number
from slipstream.generation.requests import token_limit
from slipstream.serving import wire
from slipstream.serving.auth import App, Receive, Scope, Send, answer_error
from slipstream.serving.turns import mixture_of_call

M = TypeVar("M", bound=msgspec.Struct)
LARGEST_SEED = 2**63 - 1
UNCOUNTED = ("PUT", "/weights/body")


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest sizes of one request.

    Attributes:
        prompts, completions: How many it may have, and ask for.
        tokens: Of all its prompts (characters of those given as text), once a completion, and of all its completions at
            `max_tokens`.
        reference: Whether it may ask for samples of a reference model.
    """

    prompts: int
    completions: int
    tokens: int
    reference: bool


class BodyLimit:
    """ASGI middleware that answers 413 to bodies of more than `limit` bytes; nothing beyond them is read.

    Pieces of weights are not counted: they are written where they belong as they come, and cannot be more than was
    announced.
    """

    def __init__(self, app: App, limit: int) -> None:
        self.app = app
        self._limit = limit
        self._detail = f"the body has more than {limit} bytes: send less in one request, or raise --max-body-size"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, with its body counted."""
        if scope["type"] != "http" or (scope["method"], scope["path"]) == UNCOUNTED:
            await self.app(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not announced.isdigit() or int(announced) > self._limit:
            await answer_error(send, 413, self._detail)
            return
        size = 0

        async def counted() -> Any:
            nonlocal size
            event = await receive()
            size += len(event.get("body", b""))
            if size > self._limit:
                raise HTTPException(413, self._detail)
            return event

        await self.app(scope, counted, send)


async def read_message(request: Request, kind: type[M]) -> M:
    """The message in the body of a request.

    Raises:
        HTTPException: 400, it is no such message.
    """
    body = await request.body()
    try:
        return wire.decode(body, kind, request.headers.get("content-type", wire.JSON))
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


def check_generate(message: wire.GenerateMessage, limits: Limits) -> None:
    """Check a request to generate, and turn its lists of ids into bytes.

    Raises:
        HTTPException: 400 or 413, with the place, the value and what is allowed.
    """
    try:
        _check_sampling(message.sampling)
        for index, prompt in enumerate(message.prompts):
            _check_prompt(f"prompts[{index}]", prompt)
        mixture_of_call(message, limits.reference)
    except (ValueError, OverflowError) as error:
        raise HTTPException(400, str(error)) from error
    _refuse_more(
        limits,
        prompts=len(message.prompts),
        completions=sum(prompt.n for prompt in message.prompts),
        tokens=sum(p.n * (_length(p) + token_limit(p, message.sampling)) for p in message.prompts),
    )


class _OpenAIBody(msgspec.Struct):
    """What says how much a body of vLLM's OpenAI routes asks for. The rest of it is vLLM's to judge."""

    prompt: Any = None
    messages: Any = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    structured_outputs: dict[str, Any] | None = None  # vLLM answers 500 to those of another type


def check_openai(body: bytes, limits: Limits, max_model_len: int) -> None:
    """Check how much a body of vLLM's OpenAI routes asks for: vLLM makes all of it at once, and nothing else meanwhile.

    Args:
        max_model_len: Tokens of a completion for which the body has no number.

    Raises:
        HTTPException: 400, it cannot be read; 413, it asks for too much.
    """
    try:
        asked = msgspec.json.decode(body, type=_OpenAIBody, strict=False)  # vLLM takes "2" for 2, too
    except ValueError as error:
        raise HTTPException(400, f"the body cannot be read: {error}") from error
    given = asked.messages if asked.prompt is None else asked.prompt
    several = isinstance(given, list) and bool(given) and isinstance(given[0], list | str)
    prompts = given if several else [given]
    n = 1 if asked.n is None else asked.n
    limit = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    each = max_model_len if limit is None else limit
    _refuse_more(
        limits,
        prompts=len(prompts),
        completions=n * len(prompts),
        tokens=sum(n * (_openai_length(prompt) + each) for prompt in prompts),
    )


def _openai_length(prompt: Any) -> int:
    ids = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)
    return len(prompt) if ids else characters(prompt)


def _refuse_more(limits: Limits, **asked: int) -> None:
    for what, option in (("prompts", "prompts"), ("completions", "completions"), ("tokens", "request-tokens")):
        count, most = asked[what], getattr(limits, what)
        if count > most:
            raise HTTPException(
                413, f"{count} {what} are asked for in one request; the server takes at most {most} (--max-{option})"
            )


def _check_prompt(place: str, prompt: wire.PromptMessage) -> None:
    if sum(form is not None for form in (prompt.ids, prompt.text, prompt.messages)) != 1:
        raise ValueError(f"{place}: give one of ids, text and messages")
    number(f"{place}.n", prompt.n, least=1, integer=True)
    number(f"{place}.mixture", prompt.mixture, least=0, most=1)
    if prompt.max_tokens is not None:
        number(f"{place}.max_tokens", prompt.max_tokens, least=1, integer=True)
    if prompt.seed is not None:
        number(f"{place}.seed", prompt.seed, least=0, most=LARGEST_SEED - prompt.n, integer=True)
    for name in ("ids", "expanded"):
        given = getattr(prompt, name)
        if given is not None:
            ids = wire.unpack_ids(given)
            _check_ids(f"{place}.{name}", ids)
            setattr(prompt, name, wire.pack_ids(ids))
    if prompt.images and prompt.messages is not None:
        raise ValueError(f"{place}.images go with ids or text, which have a placeholder for each")
    if prompt.expanded is not None and not prompt.images:
        raise ValueError(f"{place}.expanded is what ids become with images, and there are none")


def _check_ids(place: str, ids: Sequence[int]) -> None:
    if not ids:
        raise ValueError(f"{place} is empty: a prompt has at least one token")
    if min(ids) < 0 or max(ids) >= 2**31:
        raise ValueError(f"{place}: token ids are from 0 to {2**31 - 1}")


def _check_sampling(sampling: wire.SamplingMessage) -> None:
    number("sampling.max_tokens", sampling.max_tokens, least=1, integer=True)
    number("sampling.temperature", sampling.temperature, least=0)
    number("sampling.top_p", sampling.top_p, above=0, most=1)
    number("sampling.top_k", sampling.top_k, least=0, most=2**31 - 1, integer=True)
    number("sampling.min_p", sampling.min_p, least=0, most=1)
    number("sampling.repetition_penalty", sampling.repetition_penalty, above=0)
    for token in sampling.ends:
        number("sampling.ends", token, least=0, most=2**31 - 1, integer=True)
    # msgpack can carry what JSON cannot, here and in what vLLM is given as it is.
    for name, value in sampling.extra.items():
        if not _finite(value):
            raise ValueError(f"sampling.extra: {name!r} has a number that is not finite")


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return all(map(_finite, value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()))


def _length(prompt: wire.PromptMessage) -> int:
    ids = prompt.expanded or prompt.ids
    return len(ids) // 4 if isinstance(ids, bytes) else characters(prompt.text or prompt.messages)


def characters(value: Any) -> int:
    """Characters of a text, or of all texts in messages."""
    if isinstance(value, str):
        return len(value)
    return sum(map(characters, value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()))
