"""RLOO, Online DPO, Nash-MD and XPO on two ranks learn what they learn on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import finish, start
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "run_trainers.py"
METRICS = {
    "RLOO": ("reward", "kl", "entropy", "clip_ratio/region_mean"),
    "OnlineDPO": ("judgements/failed", "objective/scores", "objective/rlhf_reward", "rewards/margins", "logps/chosen"),
    "NashMD": ("judgements/failed", "rewards/probabilities", "loss/kl", "loss/score", "val/ref_contain_eos_token"),
    "XPO": ("judgements/failed", "objective/model_scores", "objective/kl", "loss/dpo", "val/ref_contain_eos_token"),
}


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    # At the same time: much of it is imports.
    finish(start(SCRIPT, tiny_model, one, 6, ranks=1), start(SCRIPT, tiny_model, two, 3, ranks=2))
    return one, two


@pytest.mark.slow
@pytest.mark.parametrize("name", METRICS)
def test_two_ranks_learn_what_one_does(folders, name):
    alone, together = (load_file(folder / name / "model.safetensors") for folder in folders)
    for tensor, value in alone.items():
        assert (together[tensor] - value).abs().max() < 1e-6, tensor
    histories = [json.loads((folder / name / "history.json").read_text()) for folder in folders]
    for metric in (*METRICS[name], "loss", "num_tokens"):
        for logged in (metric, f"eval_{metric}"):
            one, two = ([entry[logged] for entry in history if logged in entry] for history in histories)
            assert two == pytest.approx(one, abs=2e-5), logged
        assert len([1 for entry in histories[0] if metric in entry]) == 2
    failed = [entry["judgements/failed"] for entry in histories[0] if "judgements/failed" in entry]
    assert name == "RLOO" or any(0 < share < 1 for share in failed), failed
