"""Rollouts that went through a file are the rollouts that went in."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from slipstream.records import Completion, Prompt, Rollout
from slipstream.rollouts.stored import pack, plain, unpack

ROWS = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]
CPU = torch.device("cpu")


def prompt(index):
    return Prompt(ids=[index, 7], row=ROWS[index], index=index)


def rollouts():
    first, second = prompt(0), prompt(1)
    logps = torch.arange(5, dtype=torch.float32)
    return [
        Rollout(first, Completion([3, 4], [-0.1, math.pi], 5, "stop"), "34", False, [1.0, None], 0.5, True,
                {"old_logps": logps[:2], "scalar": 0.25}),
        Rollout(first, Completion([3, 4, 5], [-0.1, -1e-9, -3.0], 5, "length"), "345", True, [0.0, 0.1], -0.5, False,
                {"old_logps": logps[2:]}),
        Rollout(second, Completion([], None, 4, "stop"), [{"role": "assistant", "content": ""}], False),
    ]  # fmt: skip


def through_a_file(path, packed):
    torch.save(plain(packed, "rollouts"), path)
    return torch.load(path, weights_only=True)


def test_every_field_comes_back(tmp_path):
    before = rollouts()
    after = unpack(through_a_file(tmp_path / "x", pack(before)), prompt, CPU)
    for a, b in zip(before, after, strict=True):
        extra = {name: torch.as_tensor(value).tolist() for name, value in a.extra.items()}
        assert extra == {name: torch.as_tensor(value).tolist() for name, value in b.extra.items()}
        a.extra, b.extra = {}, {}
        assert a == b
    assert after[0].prompt is after[1].prompt, "a group shares its prompt"


def test_rows_of_the_dataset_are_not_stored():
    assert "answer" not in repr(pack(rollouts()))


def test_a_view_does_not_bring_the_whole_tensor():
    whole = torch.zeros(1000)
    assert plain(whole[:2], "x").untyped_storage().nbytes() == 8


def test_tensors_go_back_to_the_device_they_came_from():
    made = rollouts()
    made[0].extra = {"old_logps": torch.zeros(2, device="meta"), "sampler_logps": torch.zeros(2)}
    packed = pack(made)
    assert packed["on_device"] == ["old_logps"]
    packed["rows"][0]["extra"]["old_logps"] = torch.zeros(2)
    [first, *_] = unpack(packed, prompt, torch.device("meta"))
    assert first.extra["old_logps"].is_meta
    assert first.extra["sampler_logps"].is_cpu


def test_another_prompt_is_an_error():
    with pytest.raises(ValueError, match="row 0 of train_dataset has another prompt"):
        unpack(pack(rollouts()), lambda i: Prompt([i, 8], ROWS[i], i), CPU)


def test_numbers_of_numpy_become_pythons():
    value = plain({"a": numpy.float32(0.5), "b": (numpy.int64(3), None, True)}, "x")
    assert value == {"a": 0.5, "b": (3, None, True)}
    assert type(value["a"]) is float


def test_what_needs_code_to_load_is_an_error_with_its_place():
    with pytest.raises(TypeError, match=r"state\['a'\]\['b'\] holds a set"):
        plain({"a": {"b": {1}}}, "state")
