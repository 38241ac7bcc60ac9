"""Whether an engine of several workers holds a model's weights, told by what it samples."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

PROMPTS = [[5, 20, 30, 40], [7, 8], [9, 10, 11, 12, 13, 14]]


def changed(path, seed):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() / 2)
    return model


def named(model):
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


@torch.no_grad()
def logits_of(model, prompt, completion):
    return model(torch.tensor([[*prompt, *completion.ids]])).logits[0, len(prompt) - 1 : -1]


def differences(logits, completion):
    """Of each token's log-probability."""
    logps = logits.log_softmax(-1).gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
    return (logps - torch.tensor(completion.logprobs)).abs()


def errors(model, answers):
    """The largest difference of log-probabilities, and whether every token is the most likely one."""
    worst, likeliest = 0.0, True
    for prompt, group in zip(PROMPTS, answers, strict=True):
        for completion in group:
            logits = logits_of(model, prompt, completion)
            worst = max(worst, differences(logits, completion).max().item())
            likeliest &= logits.argmax(-1).tolist() == list(completion.ids)
    return worst, likeliest
