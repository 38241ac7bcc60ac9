"""Steps scheduled for all sequences at once on an NVIDIA GPU, where the next step is scheduled before one has ended."""

from __future__ import annotations

import functools

import asking
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Sampling
from slipstream.vllm_compat import process, steady_batch
from slipstream.weights.export import named_tensors

pytestmark = pytest.mark.gpu

PROMPTS = [[5 + (i * j) % 90 for i in range(20 + j)] for j in range(1, 13)]
CASES = {
    "natural": Sampling(96, extra={"stop_token_ids": [7, 30, 61, 99]}),
    "least": Sampling(96, extra={"stop_token_ids": [7, 30, 61, 99], "min_tokens": 40}),
    "fixed": Sampling(96, extra={"ignore_eos": True}),
    "greedy": Sampling(96, temperature=0.0, extra={"stop_token_ids": [7, 30, 61, 99]}),
}


ask = functools.partial(asking.ask, PROMPTS)


# 256 blocks of 16 tokens are too few for 64 sequences of up to 128 tokens.
@pytest.mark.parametrize("fast_logprobs", [True, False], ids=["gathered", "from vLLM"])
@pytest.mark.parametrize("blocks", [None, 256], ids=["roomy", "short of memory"])
def test_the_same_completions(tmp_path, monkeypatch, blocks, fast_logprobs):
    path = tiny.build(tmp_path / "small", hidden=256, layers=4)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).cuda()
    few = {} if blocks is None else {"num_gpu_blocks_override": blocks}
    engine = ColocateEngine(
        model=str(path), dtype="float32", max_model_len=256, max_num_seqs=64, gpu_memory_utilization=0.2,
        steady_decode=False, fast_logprobs=fast_logprobs, engine_kwargs=few,
    )  # fmt: skip
    try:
        engine.update_weights(0, named_tensors(model))
        expected = {name: ask(engine, sampling) for name, sampling in CASES.items()}
        process.decode_steadily(engine._llm)
        steps, schedule = [], steady_batch.Batch.schedule
        monkeypatch.setattr(steady_batch.Batch, "schedule", lambda batch: steps.append(1) or schedule(batch))
        for name, sampling in CASES.items():
            steps.clear()
            found = ask(engine, sampling)
            assert len(steps) > 60
            # The next step is under way when one ends, so that batches, and with them rounding, may differ.
            same = sum(a[0] == b[0] for a, b in zip(found, expected[name], strict=True))
            assert same >= 0.9 * len(found), (name, same, len(found))
            for mine, other in zip(found, expected[name], strict=True):
                assert mine[0] != other[0] or mine[1] == pytest.approx(other[1], abs=1e-2)
            for ids, logps, reason in found:
                assert len(logps) == len(ids) <= 96
                assert (reason == "length") == (len(ids) == 96 and ids[-1] not in (7, 30, 61, 99)) or name == "fixed"
        scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    finally:
        engine.close()
