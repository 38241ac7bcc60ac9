"""Weights that are divided over two ranks (FSDP2) learn what whole ones learn, over gloo."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import tiny
from launching import torchrun
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("run_sharded.py")


def launch(models, folder, kind, *names):
    started = torchrun(SCRIPT, *models, folder, kind, *names)
    done = subprocess.run(**started, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    return tiny_model, tiny.build_reward_model(tmp_path_factory.mktemp("models") / "reward")


@pytest.fixture(scope="module")
def sharded(models, tmp_path_factory):
    names = ("full", "lora", "transformers", "saved", "resumed")
    return launch(models, tmp_path_factory.mktemp("sharded"), "sharded", *names)


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    return launch(models, tmp_path_factory.mktemp("whole"), "whole", "full", "lora", "transformers")


def weights(folder):
    [file] = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("run", ["full", "lora", "transformers"])
def test_it_learns_what_whole_weights_do(sharded, whole, run):
    """The reference and the reward model, too, are the same on ranks for which transformers loads no weights."""
    expected, found = weights(whole / run), weights(sharded / run)
    assert found.keys() - expected.keys() <= {"lm_head.weight"}  # tied: gathered, it is written once more
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 1e-5, name
    first, second = (json.loads((folder / run / "history.json").read_text()) for folder in (whole, sharded))
    for name in ("reward", "kl", "entropy", "grad_norm", "eval_reward", "sampling/sampling_logp_difference/max"):
        values = [entry[name] for entry in first if name in entry]
        assert [entry[name] for entry in second if name in entry] == pytest.approx(values, abs=1e-4), name
        assert values or name.startswith(("eval", "sampling")), name


def test_rows_are_packed(sharded):
    assert json.loads((sharded / "full" / "packed.json").read_text()) is True


def test_a_resumed_run_ends_as_if_it_had_not_stopped(sharded):
    expected, found = weights(sharded / "saved"), weights(sharded / "resumed")
    for name, value in expected.items():
        assert found[name].equal(value), name
