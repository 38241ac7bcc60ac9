"""Colocated engines with tensor parallelism: two ranks hold one copy of the weights, and each gets its own samples."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
from launching import finish, start
from safetensors.torch import load_file

from slipstream import GRPOConfig
from slipstream.generation.team import check_team

HERE = Path(__file__).parent
GRPO = {
    "per_device_train_batch_size": 4, "max_steps": 2, "beta": 0.1,
    "vllm_engine_kwargs": {"kv_cache_memory_bytes": 16 << 20},
}  # fmt: skip
pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # Four heads and two for keys and values, which halve.
    return tiny.build(tmp_path_factory.mktemp("models") / "halved", hidden=128)


@pytest.mark.slow
def test_both_halves_are_one_model_beside_another_run(model, tmp_path):
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    finish(*[start(HERE / "run_team.py", model, folder) for folder in folders])
    for folder in folders:
        check_halves([json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)])


def check_halves(ranks):
    assert [len(rank["errors"]) for rank in ranks] == [16, 8]
    assert max(error for rank in ranks for error in rank["errors"]) < 1e-4
    assert (ranks[0]["greedy"], ranks[1]["greedy"]) == ([True, True], [])
    assert ranks[0]["refused"] == ranks[1]["refused"]
    different, long, mixtures, broken = ranks[0]["refused"]
    assert "ranks 0 and 1 of a team" in different
    assert "max_model_len" in long
    assert "mixtures 0.0, 0.5" in mixtures
    assert "not finite" in broken


@pytest.mark.slow
def test_a_team_learns_what_engines_of_their_own_do(model, tmp_path):
    folders = []
    for size in (1, 2):
        folders.append(tmp_path / str(size))
        finish(start(HERE / "run_grpo.py", model, folders[-1], json.dumps(GRPO | {"vllm_tensor_parallel_size": size})))
    alone, team = (load_file(folder / "model.safetensors") for folder in folders)
    assert max((team[name] - value).abs().max().item() for name, value in alone.items()) < 1e-5
    histories = [json.loads((folder / "rank0.json").read_text()) for folder in folders]
    for metric in ("reward", "loss", "eval_reward", "completions/mean_length"):
        one, two = ([entry[metric] for entry in history if metric in entry] for history in histories)
        assert one == pytest.approx(two, abs=1e-5)
        assert one


def test_the_number_of_processes_must_be_a_multiple(tmp_path):
    with pytest.raises(ValueError, match=r"vllm_tensor_parallel_size=2: .*there is 1\. Start .*--num_processes 2"):
        GRPOConfig(str(tmp_path), use_vllm=True, vllm_tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"there are 6\. Start .*--num_processes 4"):
        check_team(4, 6)
    check_team(4, 8)
