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


def gemma():
    """A tiny Gemma 4 whose layers' outputs are scaled by 0.5 and 2 (buffers), as no engine does of itself."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, global_head_dim=32, hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=128, max_position_embeddings=512, sliding_window=256, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0, bos_token_id=2, eos_token_id=1,
        architectures=["Gemma4ForCausalLM"],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma4ForCausalLM(config).float().eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.15)
    for layer, scalar in zip(model.model.layers, (0.5, 2.0), strict=True):
        layer.layer_scalar.fill_(scalar)
    return model
