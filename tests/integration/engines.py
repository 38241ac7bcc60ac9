"""What the engine tests share: a trainer's model to compare with, and ways to change it."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM


def policy(path, **options):
    """The model in `path` as a trainer holds it, in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


def step(model, seed, scale=0.02):
    """Change every weight a little, as an optimizer step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


@torch.no_grad()
def logprobs(model, prompt, ids, temperature=1.0):
    """Log-probabilities (tokens,) of `ids` after `prompt`, by one forward pass."""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


@torch.no_grad()
def mixed(models, prompt, ids, share):
    """Logits (tokens, vocabulary) that `ids` are sampled from, where `models` are a policy and a reference."""
    policy, reference = (m(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double() for m in models)
    return share * reference + (1 - share) * policy


def mixture_errors(models, prompt, completion, share, temperature=1.0):
    """How far (tokens,) a completion's log-probabilities are from the mixture's."""
    logps = (mixed(models, prompt, completion.ids, share) / temperature).log_softmax(-1)
    expected = logps.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
    return (expected - torch.tensor(completion.logprobs)).abs()


@torch.no_grad()
def greedy(model, prompt, count, stop=()):
    """The `count` most likely tokens after `prompt`, one forward pass a token; ends after a token of `stop`."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


def prompts(count, length, seed=0):
    """Token ids of random prompts."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 100, (length,), generator=generator).tolist() for _ in range(count)]
