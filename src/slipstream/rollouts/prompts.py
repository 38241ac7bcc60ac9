"""From dataset rows to token ids, and from sampled ids to what reward functions read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from slipstream.records import Prompt
from slipstream.rollouts.detokenizing import texts_of


def is_conversational(prompt: Any) -> bool:
    """Whether a prompt is a list of chat messages."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict) and "role" in prompt[0]


class PromptRenderer:
    """Renders prompts with a tokenizer and its chat template.

    Args:
        tokenizer: The model's tokenizer.
        template_kwargs: Further variables for its chat template.
        tools: Given a row, the schemas of the tools that the chat template shows to the model.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_kwargs: dict[str, Any] | None = None,
        tools: Callable[[dict[str, Any]], list[dict[str, Any]]] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self.tools = tools

    def render(self, row: dict[str, Any], index: int) -> Prompt:
        """Tokenize the `prompt` of a dataset row: a string as it is, messages through the chat template.

        A conversation that ends with an assistant message is continued, any other one is answered.

        Raises:
            ValueError: there is no chat template for a conversation, or the prompt is of no known form or empty.
        """
        tools = None if self.tools is None else self.tools(row)
        return Prompt(ids=self.encode(row["prompt"], f"row {index} of the dataset", tools), row=row, index=index)

    def encode(self, prompt: Any, where: str, tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Token ids of a string or of messages, as `render` makes them; `where` names the prompt in errors."""
        if isinstance(prompt, str):
            if tools:
                raise ValueError(
                    f"{where}: prompt={prompt!r} is a string, and the chat template shows tools to the model: give "
                    'prompts as lists of messages ({"role": ..., "content": ...}).'
                )
            ids = self.tokenizer(prompt)["input_ids"]
        elif is_conversational(prompt):
            if getattr(self.tokenizer, "chat_template", None) is None:
                raise ValueError(
                    f"{where} holds chat messages, but the tokenizer has no chat template: set "
                    "tokenizer.chat_template, or give prompts as strings."
                )
            continues = prompt[-1]["role"] == "assistant"
            ids = self.tokenizer.apply_chat_template(
                prompt,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                tokenize=True,
                return_dict=False,
                **self.template_kwargs | ({"tools": tools} if tools else {}),
            )
        else:
            raise ValueError(
                f"{where}: prompt={prompt!r} is neither a string nor a list of messages "
                '({"role": ..., "content": ...}).'
            )
        if not ids:
            raise ValueError(f"{where}: the prompt has no tokens.")
        return list(ids)

    def text(self, prompt: Prompt) -> str:
        """A prompt as people read it: the string, or the last message of the conversation."""
        given = prompt.row["prompt"]
        return given if isinstance(given, str) else str(given[-1]["content"])

    def completions(
        self, prompts: Sequence[Prompt], completion_ids: Sequence[Sequence[int]]
    ) -> list[str | list[dict[str, Any]]]:
        """Decode completions into their prompts' form: a string, or a list with one assistant message."""
        return [
            [{"role": "assistant", "content": text}] if is_conversational(prompt.row["prompt"]) else text
            for prompt, text in zip(prompts, texts_of(self.tokenizer, completion_ids), strict=True)
        ]
