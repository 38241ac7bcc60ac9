"""Several ranks, each with its engine, over gloo: what is learnt must not depend on how many there are."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from launching import torchrun
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "run_grpo.py"


def launch(model, folder, ranks, **settings):
    """Train on `ranks` ranks; return the saved tensors and each rank's log history."""
    folder.mkdir()
    started = torchrun(SCRIPT, model, folder, json.dumps({"max_steps": 2, "use_cpu": True} | settings), ranks=ranks)
    done = subprocess.run(**started, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    histories = [json.loads((folder / f"rank{r}.json").read_text()) for r in range(ranks)]
    return load_file(folder / "model.safetensors"), histories


@pytest.fixture(scope="module")
def alone(tiny_model, tmp_path_factory):
    return launch(tiny_model, tmp_path_factory.mktemp("one") / "run", 1, per_device_train_batch_size=12)


@pytest.mark.parametrize(
    "settings",
    [
        # 12 completions of 3 prompts: rank 0 has one and a half groups, rank 1 the rest.
        {"per_device_train_batch_size": 6},
        pytest.param(
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "gradient_checkpointing": True},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_ranks_learn_what_one_does(tiny_model, tmp_path, alone, settings):
    tensors, histories = launch(tiny_model, tmp_path / "run", 2, **settings)
    for name, value in alone[0].items():
        assert (tensors[name] - value).abs().max() < 1e-6, name
    for name in ("reward", "reward_std", "completions/mean_length", "num_tokens", "entropy", "eval_reward"):
        expected = [entry[name] for entry in alone[1][0] if name in entry]
        assert [entry[name] for entry in histories[0] if name in entry] == pytest.approx(expected, abs=1e-5), name
    for rank in range(2):
        found = json.loads((tmp_path / "run" / f"binary{rank}.json").read_text())
        assert found == {"binary": True, "half on one": False}
