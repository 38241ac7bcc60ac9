"""What stands between two turns of a model: the end of its turn, the results of tools, and the beginning of the next.

The chat template says how that is written. What a model sampled is never rendered: the tokens in between are a part of
a rendered conversation that is made up around them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from slipstream.rollouts.calls import Message, readers

_USER = {"role": "user", "content": "question"}
_FOUND, _RESULT, _OTHER = "looked-for", "first-result", "other-result"
WAY_OUT = "Set tokenizer.chat_template to one that does, and pass the tokenizer as processing_class."


def assistant(content: str, calls: Sequence[dict[str, Any]] = ()) -> Message:
    """A turn of the model as a message, with the calls in the form that chat templates read."""
    message: Message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [{"type": "function", "function": dict(call)} for call in calls]
    return message


def result(name: str, content: str) -> Message:
    """What a tool returned, as a message."""
    return {"role": "tool", "name": name, "content": content}


class Dialogue:
    """Reads a model's turns and writes what follows them, as its chat template does.

    Args:
        tokenizer: The model's tokenizer.
        schemas: Of the tools.
        template_kwargs: Further variables for the chat template.
        eos_ids: Tokens that end a turn.

    Raises:
        ValueError: the chat template cannot show results of tools, its turns do not end with a token of `eos_ids`, what
            it writes after a turn depends on more than the results, or calls in its format are not understood.
    """

    def __init__(
        self, tokenizer: Any, schemas: Sequence[Message], template_kwargs: dict[str, Any], eos_ids: set[int]
    ) -> None:
        self.tokenizer = tokenizer
        self._options = dict(template_kwargs) | {"tools": list(schemas)}
        self._eos_ids = eos_ids
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(f"tools: the tokenizer has no chat template that could show them to the model. {WAY_OUT}")
        call = {"name": schemas[0]["function"]["name"], "arguments": {"key": _FOUND}}
        before, turn = self._checked_turn(call)
        possible = [(read, read(turn, before)) for read in readers(tokenizer, schemas, eos_ids)]
        fitting = [read for read, found in possible if found is not None and found[1] == [call]]
        if not fitting:
            raise ValueError(
                f"tools: a call is written {tokenizer.decode(turn)!r} by the chat template, which is not understood. "
                "Set the tokenizer's response_template (see transformers' parse_response) so that it reads "
                f"{assistant('', [call])}, and pass the tokenizer as processing_class."
            )
        self._read = fitting[0]

    def read(self, ids: Sequence[int], before: Sequence[int]) -> tuple[Message, list[dict[str, Any]]]:
        """A turn that the model ended, as a message, and its calls (`name`, `arguments`).

        Args:
            ids: What it sampled.
            before: All that came before.
        """
        content, calls = self._read(ids, before) or (self.text(ids), [])
        return assistant(content, calls), calls

    def text(self, ids: Sequence[int]) -> str:
        """A turn as text."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def after(self, ids: Sequence[int], calls: Sequence[dict[str, Any]], results: Sequence[Message]) -> list[int]:
        """The tokens that follow a turn with calls: results of these, and the beginning of the next turn.

        Args:
            ids: The turn, as it was sampled. Where a stop string ended it, the token that ends turns comes first.
            calls: In it.
            results: Of the calls.
        """
        end, whole = self._end_of_turn(calls, results)
        return whole[end:] if ids[-1] in self._eos_ids else whole[end - 1 :]

    def _end_of_turn(self, calls: Sequence[dict[str, Any]], results: Sequence[Message]) -> tuple[int, list[int]]:
        """A conversation around `calls` and `results`, and how many of its tokens are those up to the calls' end."""
        opening, first = [_USER, assistant("", calls)], results[0]
        whole = self._render([*opening, *results], True)
        # Up to the first result the tokens do not depend on it. (Without a result, templates may write the turn itself
        # in another way: Qwen3's leaves thoughts in the last one alone.)
        other = self._render([*opening, first | {"content": _RESULT}, *results[1:]], True)
        if first["content"] == _RESULT:
            other = self._render([*opening, first | {"content": _OTHER}, *results[1:]], True)
        pairs = enumerate(zip(whole, other, strict=False))
        same = next((i for i, (one, another) in pairs if one != another), min(len(whole), len(other)))
        end = max((i + 1 for i, token in enumerate(whole[:same]) if token in self._eos_ids), default=0)
        return end, whole

    def _checked_turn(self, call: dict[str, Any]) -> tuple[list[int], list[int]]:
        """The tokens before a turn with a call, and those of the turn."""
        opening, answer = [_USER, assistant("", [call])], result(call["name"], _RESULT)
        try:
            end, whole = self._end_of_turn([call], [answer])
            twice = self._render([*opening, answer, opening[1], answer], True)
            asked = self._render([_USER], True)
            question = self._render([_USER], False)
        except Exception as error:  # whatever a template does of messages that it was not written for
            raise ValueError(
                "tools: the chat template does not write a conversation with calls of tools and their results "
                f"({type(error).__name__}: {error}). {WAY_OUT}"
            ) from error
        head, tail = whole[:end], whole[end:]
        written, after = self.tokenizer.decode(head), self.tokenizer.decode(tail)
        for what, left_out in (
            ("the call of a tool", call["name"] not in written + after or _FOUND not in written + after),
            ("the result of a tool", _RESULT not in after),
        ):
            if left_out:
                raise ValueError(f"tools: the chat template leaves {what} out. {WAY_OUT}")
        if call["name"] not in self.tokenizer.decode(asked):
            warnings.warn(
                "tools: the chat template does not tell the model about the tools that it has: say it in the prompts, "
                "or set tokenizer.chat_template.",
                UserWarning,
                stacklevel=6,
            )
        before = asked if head[: len(asked)] == asked else question
        turn = head[len(before) :]
        # Anything else that ended here would be taken for the end of the turn.
        if _FOUND in after or sum(token in self._eos_ids for token in turn) != 1:
            raise ValueError(
                "tools: the chat template does not end an assistant's turn with a token that ends a completion "
                f"({sorted(self._eos_ids)}), and no other one: it writes {written + after!r}. Set "
                "tokenizer.chat_template, or model.generation_config.eos_token_id."
            )
        if head[: len(before)] != before or twice[: len(head)] != head or twice[len(twice) - len(tail) :] != tail:
            raise ValueError(
                "tools: the chat template writes messages in another way once others follow them, so that what the "
                "model has seen and sampled would not be what it is trained on. "
                "It must write each message after a call of a tool the same, whatever comes before and after it. "
                f"{WAY_OUT}"
            )
        return before, turn

    def _render(self, messages: list[Message], prompt: bool) -> list[int]:
        made = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=True, return_dict=False, **self._options
        )
        return list(made)
