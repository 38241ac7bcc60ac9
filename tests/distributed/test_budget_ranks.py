"""Two ranks with different memory: one budget for both, and the run that it would be if that had been given."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from launching import torchrun

SCRIPT = Path(__file__).with_name("run_budget.py")


def train(model, folder, **settings):
    settings = {
        "packing": True, "use_cpu": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
        "max_steps": 2, "save_strategy": "no",
    } | settings  # fmt: skip
    folder.mkdir()
    started = torchrun(SCRIPT, model, folder, json.dumps(settings))
    done = subprocess.run(**started, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_the_smaller_rank_decides(tiny_model, tmp_path):
    measured = train(tiny_model, tmp_path / "measured")
    assert [told["measured"] for told in measured] == [2, 2]
    own = [-told["asked"][2] for told in measured]
    assert own[0] > own[1] > measured[0]["asked"][0]
    assert [told["max_tokens"] for told in measured] == [own[1]] * 2
    given = train(tiny_model, tmp_path / "given", max_tokens_per_micro_batch=measured[0]["max_tokens"])
    assert [told["measured"] for told in given] == [0, 0]
    assert {told["sum"] for told in given} == {told["sum"] for told in measured}
