"""Completions of a prompt whose blocks are hashed once: the same ones, and their prefixes are still found."""

from __future__ import annotations

from importlib.util import find_spec

import engines
import pytest

from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.vllm_compat.prefix_cache import PromptHasher
from slipstream.weights.export import named_tensors

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

BLOCK = 32
# Two begin with the same blocks; one is a block long, one shorter.
PROMPTS = engines.prompts(4, 100)
PROMPTS = [*PROMPTS, [*PROMPTS[0][:70], *PROMPTS[1][:25]], PROMPTS[2][:BLOCK], PROMPTS[3][:20]]


@pytest.fixture(scope="module")
def engine(tiny_model):
    engine = ColocateEngine(
        model=str(tiny_model), dtype="float32", max_model_len=192, max_num_seqs=16,
        engine_kwargs={"block_size": BLOCK},
    )  # fmt: skip
    engine.update_weights(0, named_tensors(engines.policy(tiny_model)))
    yield engine
    engine.close()


def core_of(engine):
    return engine._llm.llm_engine.engine_core.engine_core


def ask(engine, monkeypatch):
    """Completions; and tokens of every completion's prompt, those found in the cache, and hashes, in order."""
    manager, found = core_of(engine).scheduler.kv_cache_manager, []
    look = manager.get_computed_blocks

    def noting(request):
        answer = look(request)
        found.append((request.num_prompt_tokens, answer[1], request.block_hashes.copy()))
        return answer

    requests = [Request(prompt, n=8, seed=100 * i) for i, prompt in enumerate(PROMPTS)]
    with monkeypatch.context() as patch:
        patch.setattr(manager, "get_computed_blocks", noting)
        answers = engine.generate(requests, Sampling(50, extra={"stop_token_ids": [7, 30, 61]}))
    return [[(c.ids, c.logprobs, c.finish_reason) for c in group] for group in answers], found


def test_the_same_completions_and_the_same_hits(engine, tiny_model, monkeypatch):
    core, hashed = core_of(engine), []
    shared = core.request_block_hasher
    assert isinstance(shared, PromptHasher)
    plain = shared.hasher

    def counting(request):
        if not request.num_output_tokens:
            hashed.append(request.request_id)
        return plain(request)

    monkeypatch.setattr(shared, "hasher", counting)
    model, seen = engines.policy(tiny_model), []
    for hasher, each in ((counting, 8), (shared, 1)):
        monkeypatch.setattr(core, "request_block_hasher", hasher)
        engine.update_weights(1, named_tensors(model))  # which empties the cache
        hashed.clear()
        fresh = ask(engine, monkeypatch)
        assert len(hashed) == len(PROMPTS) * each
        seen.append((fresh, ask(engine, monkeypatch)))
    assert seen[0] == seen[1]
    (_, fresh), (_, again) = seen[1]
    lengths = [len(prompt) for prompt in PROMPTS for _ in range(8)]
    whole = [(length - 1) // BLOCK * BLOCK for length in lengths]  # the last token is always computed
    assert [hit for _, hit, _ in again] == whole
    # At first, the first completion of a prompt finds what another prompt has begun with.
    assert [hit for _, hit, _ in fresh] == [
        hit if place % 8 or place == 8 * 4 else 0 for place, hit in enumerate(whole)
    ]
