"""What `model.generate` samples from: the distribution, its log-probabilities, and mixtures of two models."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from slipstream.generation.engine import Sampling


class Distribution:
    """A logits processor: shapes each step's distribution and keeps the log-probability of what was drawn from it.

    It sees a drawn token at the next step, as the last one of `input_ids`, so one (rows, vocabulary) matrix is kept
    instead of one a step.
    """

    def __init__(self, sampling: Sampling, prompt_mask: Tensor) -> None:
        """`prompt_mask` (rows, prompt tokens) is 0 where a row is padded."""
        self.logprobs: list[Tensor] = []  # one (rows,) tensor a step
        self._last: Tensor | None = None
        self._sampling = sampling
        self._prompt_mask = prompt_mask.bool()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits to draw from, given the tokens so far (rows, tokens) and the model's logits (rows, vocabulary)."""
        self.record(input_ids)
        s = self._sampling
        if s.repetition_penalty != 1.0:
            scores = self._penalize(input_ids, scores)
        if s.temperature > 0:
            scores = _truncate(scores.float() / s.temperature, s)
        self._last = scores.float().log_softmax(-1)
        return scores

    def record(self, input_ids: Tensor) -> None:
        """Note the log-probability of the last token of each row."""
        if self._last is not None:
            self.logprobs.append(self._last.gather(-1, input_ids[:, -1:]).squeeze(-1))
            self._last = None

    def _penalize(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Padding is not part of the text; its token may well be the one that ends a sequence.
        seen = self._prompt_mask.new_zeros(scores.shape)
        prompt = input_ids[:, : self._prompt_mask.shape[1]]
        for row in range(len(seen)):
            seen[row, prompt[row][self._prompt_mask[row]]] = True
        seen.scatter_(1, input_ids[:, self._prompt_mask.shape[1] :], True)
        penalty = self._sampling.repetition_penalty
        return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def _truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Drop tokens by min_p, then top_k, then top_p (the order of vLLM); dropped ones get -inf. (rows, vocabulary)."""
    if sampling.min_p > 0:
        floor = logits.max(-1, keepdim=True).values + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1.0:
        ascending, order = logits.sort(-1)
        below = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        below[:, -1] = False  # the most likely token always stays
        logits = logits.masked_fill(below.scatter(-1, order, below), -torch.inf)
    return logits


@contextlib.contextmanager
def mixed_logits(policy: Any, reference: Callable[[], AbstractContextManager[Any]], mixture: float) -> Iterator[None]:
    """Within the block, generating with `policy` samples from mixture * reference logits + (1 - mixture) * its own.

    The reference follows every forward pass of the policy with the same inputs and a cache of its own: what
    transformers does to logits afterwards, it does to the mixture.
    """
    cache: Any = None
    mixing = False

    def mix(module: Any, args: Any, inputs: dict[str, Any], answer: Any) -> Any:
        nonlocal cache, mixing
        if mixing:  # the reference is the same module with its adapter off
            return answer
        mixing = True
        try:
            with reference() as model, inference(model):
                other = model(*args, **{**inputs, "past_key_values": cache})
        finally:
            mixing = False
        cache = other.past_key_values
        answer.logits = mixture * other.logits.float() + (1 - mixture) * answer.logits.float()
        return answer

    module = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    hook = module.register_forward_hook(mix, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def inference(model: Any) -> Iterator[Any]:
    """The model in evaluation mode, without gradients; its modules' training flags are put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def neutral_settings(model: Any) -> Iterator[None]:
    """Without the generation settings that the model's checkpoint brings, with which transformers fills up others.

    Some shape what is sampled (suppressed tokens, n-grams that must not repeat): the log-probabilities that training
    compares with know nothing of them, and vLLM does not have them.
    """
    from transformers import GenerationConfig

    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
