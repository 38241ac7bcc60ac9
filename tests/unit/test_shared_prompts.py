"""Hashes that completions of a prompt share: what vLLM's own code gives, computed once."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from slipstream.vllm_compat import load, prefix_cache

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

BLOCK = 16
PROMPT = list(range(1000, 1100))


@pytest.fixture
def hashing(monkeypatch):
    """vLLM's own function from a request to new hashes, and how many blocks have been hashed, in a list."""
    load()
    from vllm.utils.hashing import sha256
    from vllm.v1.core import kv_cache_utils

    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", b"nothing before", raising=False)
    hashed = []

    def counting(content):
        hashed.append(content)
        return sha256(content)

    return kv_cache_utils.get_request_block_hasher(BLOCK, counting), hashed


def made(hasher, ids=PROMPT, **options):
    """vLLM's request of a completion."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    return Request("name", ids, SamplingParams(max_tokens=50), None, block_hasher=hasher, **options)


def image(name):
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    return [MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset=3, length=20))]


def adapter(name):
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, 1, "/nowhere")


def test_completions_of_a_prompt_are_hashed_once(hashing):
    plain, hashed = hashing
    expected = made(plain).block_hashes
    assert len(expected) == len(set(expected)) == 6
    hasher = prefix_cache.PromptHasher(plain)
    hashed.clear()
    requests = [made(hasher) for _ in range(8)]
    assert len(hashed) == 6
    assert all(request.block_hashes == expected for request in requests)
    # Each goes on by itself.
    for place, request in enumerate(requests):
        request.update_block_hashes()
        assert request.block_hashes == expected
        other = made(plain)
        for tokens in ([7] * 11, [place] * 30, place):
            request.append_output_token_ids(tokens)
            other.append_output_token_ids(tokens)
        assert request.block_hashes == other.block_hashes
        assert len(request.block_hashes) == 8
    # As when a conversation goes on.
    first = list(requests[0].all_token_ids)
    assert made(hasher, first).block_hashes == made(plain, first).block_hashes == requests[0].block_hashes
    assert made(hasher).block_hashes == expected


def test_requests_in_any_order_get_their_own_hashes(hashing):
    plain, _ = hashing
    hasher = prefix_cache.PromptHasher(plain)
    changing = PROMPT.copy()
    kinds = [
        {}, {"ids": PROMPT.copy()}, {"ids": PROMPT[:50]}, {"ids": PROMPT[:10]}, {"ids": []}, {"ids": [0] * 100},
        {"ids": [*PROMPT[:-1], 5]}, {"ids": [5, *PROMPT[1:]]}, {"ids": changing}, {"cache_salt": "salt"},
        {"cache_salt": "pepper"}, {"mm_features": image("cat")}, {"mm_features": image("dog")},
        {"lora_request": adapter("a")}, {"lora_request": adapter("b")},
        {"ids": None, "prompt_embeds": torch.ones(100, 4)}, {"ids": None, "prompt_embeds": torch.zeros(100, 4)},
    ]  # fmt: skip
    order = torch.randint(len(kinds), (400,), generator=torch.Generator().manual_seed(0)).tolist()
    seen = set()
    for place, following in zip(order, order[1:] + order[:1], strict=True):
        changing[20] += 1
        assert made(hasher, **kinds[place]).block_hashes == made(plain, **kinds[place]).block_hashes
        seen.add((place, following))
    assert len(seen) > len(kinds) ** 2 / 2


def test_a_prompt_shorter_than_a_block_is_hashed_when_it_has_grown(hashing):
    plain, _ = hashing
    hasher = prefix_cache.PromptHasher(plain)
    short = [made(hasher, PROMPT[:10]) for _ in range(2)]
    assert [request.block_hashes for request in short] == [[], []]
    for request, tokens in zip(short, ([1] * 7, [2] * 7), strict=True):
        request.append_output_token_ids(tokens)
        assert request.block_hashes == made(plain, PROMPT[:10] + tokens).block_hashes
        assert len(request.block_hashes) == 1


def core_of(hasher):
    return SimpleNamespace(request_block_hasher=hasher)


def test_what_is_not_known_is_left_alone(hashing):
    plain, _ = hashing
    for version in ("0.26.1", "0.33.0"):
        core = core_of(plain)
        prefix_cache.hash_once(core, version)
        assert isinstance(core.request_block_hasher, prefix_cache.PromptHasher)
    for version in ("0.25.0", "0.34.0"):
        core = core_of(plain)
        prefix_cache.hash_once(core, version)
        assert core.request_block_hasher is plain
    for other in (None, made, prefix_cache.PromptHasher(plain)):
        core = core_of(other)
        prefix_cache.hash_once(core, "0.32.0")
        assert core.request_block_hasher is other
