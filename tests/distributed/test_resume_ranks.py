"""Several ranks that are killed and resumed: each continues with its own share of the rollouts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from launching import torchrun
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "integration" / "resumable.py"
# Generation batches of 8 steps, 3 groups over 2 ranks.
SETTINGS = {
    "steps_per_generation": 4, "gradient_accumulation_steps": 1, "num_iterations": 2, "beta": 0.1, "logging_steps": 2,
    "per_device_train_batch_size": 6, "num_generations": 16, "use_cpu": True,
}  # fmt: skip


def start(model, folder, fate):
    folder.mkdir(exist_ok=True)
    started = torchrun(SCRIPT, model, folder, json.dumps(SETTINGS), fate)
    return subprocess.Popen(**started, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(run):
    try:
        return run.communicate(timeout=600)[0]
    finally:
        run.kill()


def result(folder):
    history = [json.loads((folder / f"history{rank}.json").read_text()) for rank in range(2)]
    measured = ("time", "per_second", "seconds")
    logs = [[{k: v for k, v in e.items() if not any(m in k for m in measured)} for e in h] for h in history]
    return load_file(folder / "model.safetensors"), logs


@pytest.mark.slow
def test_two_killed_ranks_continue_as_if_nothing_had_been(tiny_model, tmp_path):
    runs = {
        "leave": start(tiny_model, tmp_path / "whole", "leave"),
        "kill": start(tiny_model, tmp_path / "cut", "kill"),
    }
    output = {fate: finish(run) for fate, run in runs.items()}
    assert runs["leave"].returncode == 0, output["leave"][-4000:]
    assert "Signal 9 (SIGKILL)" in output["kill"], output["kill"][-4000:]
    checkpoint = tmp_path / "cut" / "checkpoint-5"
    parts = [torch.load(checkpoint / f"slipstream_rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert [len(part["batch"][1]["rows"]) for part in parts] == [24, 24]
    assert parts[0]["batch"][1]["rows"][0]["text"] != parts[1]["batch"][1]["rows"][0]["text"]
    assert not (tmp_path / "cut" / "checkpoint-10").exists()

    again = start(tiny_model, tmp_path / "cut", "resume")
    output["resume"] = finish(again)
    assert again.returncode == 0, output["resume"][-4000:]

    (whole, logs), (resumed, logs_resumed) = result(tmp_path / "whole"), result(tmp_path / "cut")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert logs == logs_resumed
