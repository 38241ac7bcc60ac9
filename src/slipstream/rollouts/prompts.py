"""From dataset rows to token ids, and from sampled ids to what reward functions read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from slipstream.records import Prompt
from slipstream.rollouts import images
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
        processor: What makes tensors of prompts with images (it has the tokenizer, too); None: there can be none.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_kwargs: dict[str, Any] | None = None,
        *,
        tools: Callable[[dict[str, Any]], list[dict[str, Any]]] | None = None,
        processor: Any | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self.tools = tools
        self.processor = processor

    def render(self, row: dict[str, Any], index: int) -> Prompt:
        """Tokenize the `prompt` of a dataset row: a string as it is, messages through the chat template.

        A conversation that ends with an assistant message is continued, any other one is answered. Images of the row's
        columns `image` or `images` get their places in the conversation: see `images.fill`.

        Raises:
            ValueError: there is no chat template for a conversation, the prompt is of no known form or empty, or it and
                its images do not go together.
        """
        where = f"row {index} of the dataset"
        if images.has_images(row):
            return self._render_images(row, index, where)
        return Prompt(ids=self.encode(row["prompt"], where, self._tools(row)), row=row, index=index)

    def _tools(self, row: dict[str, Any]) -> list[dict[str, Any]] | None:
        return None if self.tools is None else self.tools(row)

    def _render_images(self, row: dict[str, Any], index: int, where: str) -> Prompt:
        prompt = row["prompt"]
        if self.processor is None:
            raise ValueError(f"{where} has images, but the model takes text alone.")
        if not is_conversational(prompt):
            raise ValueError(
                f"{where} has images, and its prompt is a {type(prompt).__name__}: it must be a list of messages "
                '({"role": ..., "content": ...}), in which they have their places.'
            )
        messages, pictures = images.fill(prompt, images.find_images(row, where), where)
        ids, made = images.process(self.processor, self._written(messages, where), pictures, where)
        return Prompt(ids=ids, row=row, index=index, images=made)

    def text_tokens(self, row: dict[str, Any], index: int) -> int:
        """Tokens of the prompt of row `index` if its images had none; `row` may lack their columns."""
        where, prompt = f"row {index} of the dataset", row["prompt"]
        if self.processor is None or not images.has_images({"prompt": prompt}):
            return len(self.encode(prompt, where, self._tools(row)))
        text = self._written(images.emptied(prompt, where), where)
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _written(self, messages: list[dict[str, Any]], where: str) -> Any:
        """Messages with places for images, as the processor's template writes them."""
        assert self.processor is not None
        self._check_template(self.processor, where)
        return self.processor.apply_chat_template(messages, tokenize=False, **self._ending(messages))

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
            options = self._template | self._ending(prompt) | ({"tools": tools} if tools else {})
            if not self._template:
                self._check_template(self.tokenizer, where)
            messages = self._as_written(prompt, where)
            ids = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        else:
            raise ValueError(
                f"{where}: prompt={prompt!r} is neither a string nor a list of messages "
                '({"role": ..., "content": ...}).'
            )
        if not ids:
            raise ValueError(f"{where}: the prompt has no tokens.")
        return list(ids)

    def _ending(self, messages: Any) -> dict[str, Any]:
        continues = messages[-1]["role"] == "assistant"
        return {"add_generation_prompt": not continues, "continue_final_message": continues, **self.template_kwargs}

    @cached_property
    def _template(self) -> dict[str, Any]:
        """The processor's template, where the tokenizer has none: that is how older models are saved."""
        if getattr(self.tokenizer, "chat_template", None) is not None:
            return {}
        template = getattr(self.processor, "chat_template", None)
        return {} if template is None else {"chat_template": template}

    @cached_property
    def _reads_strings(self) -> bool:
        """Whether the template shows a content that is a string; those of some vision-language models pass over it."""
        probe, options = "Slipstream", self._template | self.template_kwargs
        try:
            shown = self.tokenizer.apply_chat_template([{"role": "user", "content": probe}], tokenize=False, **options)
        except Exception:  # noqa: BLE001 - whatever a template refuses: the prompt itself will say so, if it is refused
            return True
        return probe in shown

    def _as_written(self, messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
        """Messages of text alone, in the form that a vision-language model's template shows."""
        if self.processor is None:
            return messages
        return [
            message
            if message.get("content") is None or (isinstance(message["content"], str) and self._reads_strings)
            else images.emptied([message], where)[0]
            for message in messages
        ]

    @staticmethod
    def _check_template(owner: Any, where: str) -> None:
        if getattr(owner, "chat_template", None) is None:
            kind = "tokenizer" if not hasattr(owner, "tokenizer") else "processor"
            instead = ", or give prompts as strings" if kind == "tokenizer" else ""
            raise ValueError(
                f"{where} holds chat messages, but the {kind} has no chat template: set {kind}.chat_template{instead}."
            )

    def text(self, prompt: Prompt) -> str:
        """A prompt as people read it: the string, or the last message of the conversation; `[image]` for each image."""
        given = prompt.row["prompt"]
        if isinstance(given, str):
            return given
        content = given[-1]["content"]
        if isinstance(content, list):
            return "\n".join("[image]" if part.get("type") == "image" else str(part.get("text")) for part in content)
        places = 0 if prompt.images is None else len(prompt.images.pictures)
        return "[image]\n" * places + str(content)

    def completions(
        self, prompts: Sequence[Prompt], completion_ids: Sequence[Sequence[int]]
    ) -> list[str | list[dict[str, Any]]]:
        """Decode completions into their prompts' form: a string, or a list with one assistant message."""
        return [
            [{"role": "assistant", "content": text}] if is_conversational(prompt.row["prompt"]) else text
            for prompt, text in zip(prompts, texts_of(self.tokenizer, completion_ids), strict=True)
        ]
