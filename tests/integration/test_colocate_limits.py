"""An engine at its limits: more prompt tokens at once than fit in one of its steps."""

from __future__ import annotations

import engines
import pytest

from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.weights.export import named_tensors


@pytest.fixture(scope="module")
def engine(tiny_model):
    """A step takes 128 tokens, which four and a bit of the prompts below fill."""
    made = ColocateEngine(
        model=str(tiny_model), dtype="float32", max_model_len=128, max_num_seqs=64,
        engine_kwargs={"max_num_batched_tokens": 128, "enable_prefix_caching": False},
    )  # fmt: skip
    made.update_weights(0, named_tensors(engines.policy(tiny_model)))
    yield made
    made.close()


def test_seeded_requests_may_be_more_than_a_step_holds(engine):
    requests = [Request(p, n=3, seed=10 * i) for i, p in enumerate(engines.prompts(12, 30))]
    crowded = engine.generate(requests, Sampling(6))
    alone = [engine.generate([request], Sampling(6))[0] for request in requests]
    assert [[c.ids for c in group] for group in crowded] == [[c.ids for c in group] for group in alone]


def test_a_request_may_have_a_limit_of_its_own(engine):
    """Of its prefix in a longer completion; and a prompt that has room for no more is not refused."""
    [short, long] = engines.prompts(2, 20)
    whole = engine.generate([Request(short, seed=3)], Sampling(12))[0][0]
    limited, other = engine.generate([Request(short, seed=3, max_tokens=2), Request(long, seed=4)], Sampling(12))
    assert limited[0].ids == whole.ids[:2]
    assert limited[0].finish_reason == "length"
    assert len(other[0].ids) > 2
    full = engines.prompts(1, 126)[0]
    assert len(engine.generate([Request(full, max_tokens=2)], Sampling(12))[0][0].ids) <= 2
    with pytest.raises(ValueError, match="126 prompt tokens; with max_tokens=3"):
        engine.generate([Request(full, max_tokens=3)], Sampling(12))
    assert engine.generate([], Sampling(12)) == []


def test_a_limit_of_its_own_is_more_than_least_tokens(engine):
    """A turn may have less room left than `min_tokens`: the run goes on."""
    [prompt] = engines.prompts(1, 20)
    sampling = Sampling(12, extra={"min_tokens": 5})
    [[short], [whole]] = engine.generate([Request(prompt, seed=3, max_tokens=2), Request(prompt, seed=3)], sampling)
    assert short.ids == whole.ids[:2]
    assert len(whole.ids) >= 5
