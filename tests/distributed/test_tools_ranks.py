"""Ranks whose rollouts have different numbers of turns wait for each other, and learn what one rank does."""

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path

import calling
import pytest
from launching import torchrun
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("run_tools.py")
pytestmark = pytest.mark.slow  # test_ranks.py is alike, without tools
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def launch(model, folder, ranks, kind="whole", **settings):
    """Train; return the saved tensors, and each rank's log and the sizes of its calls."""
    folder.mkdir()
    started = torchrun(SCRIPT, model, folder, json.dumps(settings), kind, ranks=ranks)
    done = subprocess.run(**started, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return load_file(folder / "model.safetensors"), *zip(*found, strict=True)


def same(one, two):
    """The same weights and metrics."""
    tensors, histories, _ = one
    for name, value in tensors.items():
        assert (two[0][name] - value).abs().max() < 1e-5, name
    for name in ("reward", "completions/mean_length", "num_tokens", "entropy", "tools/call_frequency",
                 "tools/failure_frequency", "eval_reward", "eval_tools/call_frequency"):  # fmt: skip
        expected = [entry[name] for entry in histories[0] if name in entry]
        assert [entry[name] for entry in two[1][0] if name in entry] == pytest.approx(expected, abs=1e-4), name
        assert expected, name


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # Its heads can be halved.
    return calling.build(tmp_path_factory.mktemp("models") / "calling", hidden=128, steps=150)


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    return launch(model, folder, 1, use_vllm=True, per_device_train_batch_size=12)


@needs_vllm
def test_two_ranks_learn_what_one_does(model, alone, tmp_path):
    found = launch(model, tmp_path / "run", 2, use_vllm=True)
    same(alone, found)
    first, second = found[2]
    assert len(first) == len(second), "all ranks call their engines equally often"
    assert first[:2] == [6, 0], "the first one's prompts call no tools"
    assert second[:2] == [6, 6]


@needs_vllm
@pytest.mark.slow
def test_a_rank_that_loses_its_engine_between_turns_holds_up_no_other(model, alone, tmp_path):
    found = launch(model, tmp_path / "run", 2, use_vllm=True, lose=2)
    same(alone, found)
    first, second = found[2]
    assert first[:4] == [6, 0, 6, 0], "all of it was sampled again, by both"
    assert second[:4] == [6, 6, 6, 6]


@needs_vllm
@pytest.mark.slow
def test_so_do_two_that_share_one_engine(model, alone, tmp_path):
    engine = {"kv_cache_memory_bytes": 16 << 20}
    same(
        alone, launch(model, tmp_path / "run", 2, use_vllm=True, vllm_tensor_parallel_size=2, vllm_engine_kwargs=engine)
    )


@pytest.mark.slow
def test_ranks_that_divide_the_weights_they_sample_with_do_not_wait_for_ever(model, tmp_path):
    _, histories, (first, second) = launch(model, tmp_path / "run", 2, "sharded", use_vllm=False)
    assert first == second, "as many requests, those that fill up included"
    assert first[1] > 3, "its own prompts call no tools"
    # It samples what whole weights do, but for rounding.
    assert histories[0][0]["tools/call_frequency"] > 0.3
