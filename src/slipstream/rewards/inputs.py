"""What every reward function does first: take the text out of a completion, and check what it was called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def last_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion: itself, or the content of its last assistant message.

    A message without a role counts as the assistant's. Content may be a string, a list of parts (their `text` is
    joined) or None (a message that only calls tools), which is the empty text.

    Raises:
        TypeError: `completion` is neither a string nor a list of messages.
        ValueError: No message is the assistant's.
    """
    if isinstance(completion, str):
        return completion
    messages: Sequence[Any] = completion
    if not isinstance(messages, Sequence) or not all(isinstance(message, dict) for message in messages):
        raise TypeError(
            f"a completion must be a string or a list of messages like {{'role': 'assistant', 'content': '...'}}, "
            f"got {_short(completion)}"
        )
    for message in reversed(messages):
        if message.get("role", "assistant") == "assistant":
            return _content(message)
    raise ValueError(f"a completion has no assistant message to score: {_short(completion)}")


def texts(completions: Sequence[Any]) -> list[str]:
    """`last_text` of each completion."""
    if isinstance(completions, str) or not isinstance(completions, Sequence):
        raise TypeError(f"completions must be a list with one entry a completion, got {_short(completions)}")
    return [last_text(completion) for completion in completions]


def same_length(completions: Sequence[Any], **columns: Sequence[Any] | None) -> None:
    """Check that each named column is a list with one value a completion.

    Raises:
        TypeError: A column is None or no list (for `solution`: most often the dataset has no such column).
        ValueError: A column is longer or shorter than `completions`.
    """
    for name, values in columns.items():
        if values is None or isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(
                f"{name} must be a list with one value a completion, got {_short(values)}; "
                f"give the dataset a column {name!r}"
            )
        if len(values) != len(completions):
            raise ValueError(f"{name} has {len(values)} values for {len(completions)} completions; they must match")


def check_number(name: str, value: Any, *, integer: bool = False) -> None:
    """Raise TypeError unless `value` is a finite number (an int when `integer`); booleans do not count."""
    kinds = int if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name} must be {'an integer' if integer else 'a number'}, got {_short(value)}")
    if not float("-inf") < value < float("inf"):
        raise ValueError(f"{name} must be finite, got {value}")


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(part, dict) for part in content):
        return "".join(part.get("text") or "" for part in content)
    raise TypeError(f"a message's content must be a string, a list of parts or None, got {_short(content)}")


def _short(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 80 else shown[:77] + '...'}"
