"""Decode steps as CUDA graphs on an NVIDIA GPU, beside vLLM's own steps."""

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
from slipstream.vllm_compat.steady_runner import SteadyRunner
from slipstream.weights.export import named_tensors

pytestmark = pytest.mark.gpu

PROMPTS = [[5 + (i * j) % 90 for i in range(20 + j)] for j in range(1, 13)]
STOPS = {"stop_token_ids": [7, 30, 61, 99]}
BY_GRAPHS = {
    "natural": Sampling(96, extra=STOPS),
    "fixed": Sampling(96, extra={"ignore_eos": True}),
    "greedy": Sampling(96, temperature=0.0, extra=STOPS),
    "warm": Sampling(96, temperature=0.7, extra=STOPS),
}
BY_VLLM = {
    "top_p": Sampling(64, top_p=0.9, extra=STOPS),
    "least": Sampling(64, extra={**STOPS, "min_tokens": 40}),
    "penalty": Sampling(64, repetition_penalty=1.2, extra=STOPS),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("models") / "small", hidden=256, layers=4)


def started(path, **options):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).cuda()
    options = {"max_num_seqs": 64, "gpu_memory_utilization": 0.2, **options}
    engine = ColocateEngine(model=str(path), dtype="bfloat16", max_model_len=256, **options)
    engine.update_weights(0, named_tensors(model))
    return model, engine, getattr(process.worker_of(engine._llm).model_runner.execute_model, "__self__", None)


ask = functools.partial(asking.ask, PROMPTS)


def check_scores(model, answers, temperature=1.0):
    """Log-probabilities are the model's own, up to bfloat16's rounding, which large weights make coarse."""
    for place in range(0, len(answers), 17):
        ids, logps, _ = answers[place]
        prompt = PROMPTS[place // 8]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + list(ids)], device="cuda")).logits[0, len(prompt) - 1 : -1].float()
        expected = (logits / (temperature or 1.0)).log_softmax(-1).gather(-1, torch.tensor(ids).cuda()[:, None])[:, 0]
        assert (expected.cpu() - torch.tensor(logps)).abs().mean() < 0.3


# 256 blocks of 16 tokens are too few for 64 sequences of up to 128 tokens.
@pytest.mark.parametrize("fast_logprobs", [True, False], ids=["gathered", "from vLLM"])
@pytest.mark.parametrize("blocks", [None, 256], ids=["roomy", "short of memory"])
def test_the_same_completions_bit_for_bit(path, monkeypatch, blocks, fast_logprobs):
    few = {} if blocks is None else {"num_gpu_blocks_override": blocks}
    model, engine, runner = started(path, fast_logprobs=fast_logprobs, engine_kwargs=few)
    try:
        assert isinstance(runner, SteadyRunner)
        with monkeypatch.context() as patch:
            patch.setattr(SteadyRunner, "_ready", lambda self, step: None)
            expected = {name: ask(engine, sampling) for name, sampling in {**BY_GRAPHS, **BY_VLLM}.items()}
        assert runner.steps == 0
        for name, sampling in BY_GRAPHS.items():
            before = runner.steps
            found = ask(engine, sampling)
            assert runner.steps > before + 60
            same = sum(a == b for a, b in zip(found, expected[name], strict=True))
            # Short of memory, who is put off depends on when blocks are asked for, and with it the batches' rounding.
            assert same == len(found) if blocks is None else same > 0.5 * len(found), (name, same)
            check_scores(model, found, sampling.temperature)
        before = runner.steps
        for name, sampling in BY_VLLM.items():
            found = ask(engine, sampling)
            same = sum(a[0] == b[0] for a, b in zip(found, expected[name], strict=True))
            assert same == len(found) if blocks is None else same > 0.5 * len(found), (name, same)
        assert runner.steps == before
    finally:
        engine.close()


def test_new_weights_and_sleep(path):
    model, engine, runner = started(path, enable_sleep_mode=True)
    try:
        first = ask(engine, BY_GRAPHS["fixed"])
        engine.sleep(1)
        engine.wake()
        assert ask(engine, BY_GRAPHS["fixed"]) == first
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        engine.update_weights(1, named_tensors(model))
        second = ask(engine, BY_GRAPHS["fixed"])
        assert second != first
        check_scores(model, second)
        engine.sleep(2)
        engine.wake()
        engine.update_weights(2, named_tensors(model))
        assert ask(engine, BY_GRAPHS["fixed"]) == second
        assert runner.steps > 300
    finally:
        engine.close()


def test_graphs_of_parts_are_vllms(path, monkeypatch):
    model, engine, runner = started(
        path, max_num_seqs=20, engine_kwargs={"compilation_config": {"cudagraph_mode": "PIECEWISE"}}
    )
    try:
        assert not isinstance(runner, SteadyRunner)
        with monkeypatch.context() as patch:
            patch.setattr(steady_batch.Batch, "of", staticmethod(lambda *args: None))
            expected = ask(engine, BY_GRAPHS["natural"])
        assert ask(engine, BY_GRAPHS["natural"]) == expected
        check_scores(model, expected)
    finally:
        engine.close()


@pytest.mark.parametrize("options", [{"cudagraph_mode": "FULL"}, {"splitting_ops": []}], ids=str)
def test_wrong_graphs_of_whole_steps_are_refused(path, options):
    with pytest.raises(NotImplementedError, match=r"'FULL', or was made so.* Use 'FULL_AND_PIECEWISE'"):
        started(path, max_num_seqs=20, engine_kwargs={"compilation_config": options})
