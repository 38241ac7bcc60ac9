"""Prompts with images on two ranks, one of which has none at times: they learn what one rank learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import finish, found_first, start
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "run_images.py"
METRICS = ("loss", "reward", "kl", "eval_reward", "eval_loss", "num_tokens")


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(tiny_vision_model, tmp_path):
    path = found_first(SCRIPT.parents[1])
    runs = [
        start(SCRIPT, tiny_vision_model, tmp_path / str(ranks), 16 // ranks, ranks=ranks, PYTHONPATH=path)
        for ranks in (1, 2)
    ]
    finish(*runs)
    alone, together = (load_file(tmp_path / ranks / "model.safetensors") for ranks in ("1", "2"))
    for tensor, value in alone.items():
        assert (together[tensor] - value).abs().max() < 1e-5, tensor
    one, two = (json.loads((tmp_path / ranks / "history.json").read_text()) for ranks in ("1", "2"))
    for name in METRICS:
        assert [e[name] for e in two if name in e] == pytest.approx([e[name] for e in one if name in e], abs=1e-4)
    assert len([entry for entry in one if "loss" in entry]) == 3
