"""What tests on a GPU ask of an engine."""

from __future__ import annotations

from slipstream.generation.engine import Request


def ask(prompts, engine, sampling):
    """Token ids, log-probabilities and the reason of the end of 8 completions of each prompt, with seeds."""
    requests = [Request(prompt, n=8, seed=100 * i) for i, prompt in enumerate(prompts)]
    return [(c.ids, c.logprobs, c.finish_reason) for group in engine.generate(requests, sampling) for c in group]
