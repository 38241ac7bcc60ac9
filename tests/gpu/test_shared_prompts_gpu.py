"""Tokens that are staged once for all completions of a prompt, on an NVIDIA GPU."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.vllm_compat import process
from slipstream.vllm_compat.shared_prompts import PromptHasher, StagedRows
from slipstream.weights.export import named_tensors

pytestmark = pytest.mark.gpu

PROMPTS = [[5 + (i * j) % 90 for i in range(20 + j)] for j in range(1, 13)]


def test_the_gpu_gets_every_prompt(tmp_path):
    path = tiny.build(tmp_path / "small", hidden=256, layers=4)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).cuda()
    engine = ColocateEngine(
        model=str(path), dtype="float32", max_model_len=256, max_num_seqs=96, gpu_memory_utilization=0.2
    )
    try:
        engine.update_weights(0, named_tensors(model))
        assert isinstance(engine._llm.llm_engine.engine_core.engine_core.request_block_hasher, PromptHasher)
        states = process.worker_of(engine._llm).model_runner.req_states
        tokens = states.all_token_ids
        assert isinstance(tokens._staged_write_contents, StagedRows)
        # A penalty reads the prompts where they were written.
        sampling = Sampling(32, temperature=0.0, repetition_penalty=1.3, logprobs=False)
        requests = [Request(prompt, n=8) for prompt in PROMPTS]
        found = [c.ids for group in engine.generate(requests, sampling) for c in group]
        torch.cuda.synchronize()
        rows = {tuple(row[:length]) for row in tokens.gpu.tolist() for length in {len(p) for p in PROMPTS}}
        assert {tuple(prompt) for prompt in PROMPTS} <= rows
        del tokens.apply_write  # vLLM's own, from now on
        tokens._staged_write_contents = []
        engine.update_weights(1, named_tensors(model))
        assert [c.ids for group in engine.generate(requests, sampling) for c in group] == found
    finally:
        engine.close()
