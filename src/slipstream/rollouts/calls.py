"""Finding the calls of tools in what a model wrote, in the format of its chat template."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

Message = dict[str, Any]
# What was written beside the calls, and the calls as `{"name", "arguments"}`; None: there is none, or one is malformed.
Found = tuple[str, list[dict[str, Any]]] | None
# Given the tokens of a turn and those before it, what is found in it.
Reader = Callable[[Sequence[int], Sequence[int]], Found]

THOUGHT = "</think>"
# Arguments that are nested deeper are none: copying them for tools and reward functions would end the run.
DEEPEST = 100


def tagged(text: str) -> Found:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one or several, as Hermes and Qwen write them."""
    thought, mark, answer = text.rpartition(THOUGHT)  # a call that is only thought of is none
    pieces = re.split(r"<tool_call>(.*?)</tool_call>", answer, flags=re.DOTALL)
    calls = [_call(piece, "arguments") for piece in pieces[1::2]]
    beside = "".join(pieces[0::2])
    if not calls or None in calls or "<tool_call>" in beside:
        return None
    return (thought + mark + beside).strip(), [call for call in calls if call]


def bare(text: str) -> Found:
    """`{"name": ..., "parameters": {...}}` and nothing else, one a turn, as Llama 3 writes it."""
    call = _call(text.strip().removeprefix("<|python_tag|>"), "parameters")
    return None if call is None else ("", [call])


FORMATS: dict[str, Callable[[str], Found]] = {"<tool_call>": tagged, '{"name", "parameters"}': bare}


def readers(tokenizer: Any, schemas: Sequence[Message], eos_ids: set[int]) -> list[Reader]:
    """What may understand the tokenizer's model: the tokenizer's own parser if it has one, else the formats we know."""
    parse = getattr(tokenizer, "parse_response", None)
    known = inspect.signature(parse).parameters if parse else {}
    # Newer transformers parse with `response_template` and want to see what came before the turn.
    attribute = "response_template" if "prefix" in known else "response_schema"
    if parse and getattr(tokenizer, attribute, None) is not None:
        options = {"tools": list(schemas)} if "tools" in known else {}
        return [_own_parser(tokenizer, parse, "prefix" in known, options)]

    def reader(find: Callable[[str], Found]) -> Reader:
        def read(ids: Sequence[int], before: Sequence[int]) -> Found:
            # The markers of calls may be special tokens; the end of the turn is none of them.
            ids = list(ids[:-1] if ids and ids[-1] in eos_ids else ids)
            return find(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

        return read

    return [reader(find) for find in FORMATS.values()]


def _own_parser(tokenizer: Any, parse: Any, with_prefix: bool, options: dict[str, Any]) -> Reader:
    def read(ids: Sequence[int], before: Sequence[int]) -> Found:
        try:
            message = parse(list(ids), **options, **({"prefix": list(before)} if with_prefix else {}))
            calls = [_checked(call.get("function"), "arguments") for call in (message or {}).get("tool_calls") or []]
        except Exception:  # noqa: BLE001  whatever a parser makes of a malformed call
            return None
        if not calls or None in calls:
            return None
        content = str(message.get("content") or "").removesuffix(tokenizer.eos_token or "")
        return content, [call for call in calls if call]

    return read


def _call(written: str, arguments: str) -> dict[str, Any] | None:
    try:
        return _checked(json.loads(written), arguments)
    except (ValueError, RecursionError):
        return None


def _checked(call: Any, arguments: str) -> dict[str, Any] | None:
    """A call as `{"name", "arguments"}`; None if it is none."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(call.get(arguments), dict):
        return None
    made = {"name": call["name"], "arguments": call[arguments]}
    if _is_deeper(made, DEEPEST):
        return None
    try:
        # JSON can hold half a surrogate pair, and numbers that are none; no template can write them again.
        json.dumps(made, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        return None
    return made


def _is_deeper(value: Any, most: int) -> bool:
    """Whether lists and dicts are nested more than `most` times."""
    if not isinstance(value, list | dict):
        return False
    return most == 0 or any(_is_deeper(v, most - 1) for v in (value.values() if isinstance(value, dict) else value))
