"""Operations that a forward and backward pass needs, and how many a device makes in a second."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from slipstream.records import Rollout


def needed(config: PretrainedConfig, parameters: int, rollouts: Sequence[Rollout], *, prompts_once: bool) -> float:
    """Operations of forward and backward passes over these rollouts' own tokens: no padding, nothing computed again.

    Six a token for each parameter outside the embedding, six a completion token for each of the head, and twelve for
    each pair of a token and one that it sees, times the size of all heads, in each layer.

    Args:
        config: Of a decoder with tied embeddings.
        parameters: All of the model's, the embedding once.
        rollouts: Those of one prompt have the same prompt object.
        prompts_once: Count the tokens of a prompt once for all of its completions, as where they share it.
    """
    head = config.vocab_size * config.hidden_size
    tokens = completions = pairs = 0
    seen: set[int] = set()
    for rollout in rollouts:
        p, c = len(rollout.prompt.ids), len(rollout.completion.ids)
        completions += c
        tokens += c
        pairs += c * p + c * (c + 1) // 2
        if not (prompts_once and id(rollout.prompt) in seen):
            tokens += p
            pairs += p * (p + 1) // 2
        seen.add(id(rollout.prompt))
    size = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = 12 * config.num_hidden_layers * size * pairs
    return 6 * (parameters - head) * tokens + 6 * head * completions + attention


def matrix_rate(device: torch.device, size: int | None = None, repeats: int = 20) -> float:
    """Operations a second of a large bfloat16 product (on a CPU, of a smaller float32 one)."""
    cuda = device.type == "cuda"
    size, dtype = size or (8192 if cuda else 1024), torch.bfloat16 if cuda else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    for _ in range(3):
        left @ right
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        left @ right
    synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - start)
