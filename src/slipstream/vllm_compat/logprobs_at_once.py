"""Taking the log-probabilities of many tokens that come at once, as they do after steady steps, without a loop."""

from __future__ import annotations

import importlib
from typing import Any


def install() -> None:
    """Let vLLM's output processors of this process do it where only sampled tokens are asked for, without text."""
    processor: Any = importlib.import_module("vllm.v1.engine.logprobs").LogprobsProcessor
    flat: Any = importlib.import_module("vllm.logprobs").FlatLogprobs
    one_by_one = processor._update_sample_logprobs
    if hasattr(one_by_one, "_slipstream"):
        return

    def update(self: Any, lists: Any) -> None:
        kept, count = self.logprobs, len(lists.logprobs)
        if count < 2 or self.num_logprobs != 0 or self.tokenizer is not None or type(kept) is not flat:
            one_by_one(self, lists)
            return
        first, logprobs = len(kept), lists.logprobs[:, 0].tolist()
        kept.start_indices.extend(range(first, first + count))
        kept.end_indices.extend(range(first + 1, first + count + 1))
        kept.token_ids.extend(lists.logprob_token_ids[:, 0].tolist())
        kept.logprobs.extend(logprobs)
        kept.ranks.extend(lists.sampled_token_ranks.tolist())
        kept.decoded_tokens.extend([None] * count)
        self.cumulative_logprob += sum(logprobs)

    update._slipstream = True  # type: ignore[attr-defined]
    processor._update_sample_logprobs = update
