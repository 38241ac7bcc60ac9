"""The quickstart's files: small, honest (nothing held out is trained on), and what its README says they are."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"


def load(name):
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(split):
    return [json.loads(line) for line in (FOLDER / "data" / f"{split}.jsonl").open()]


def numbers(row):
    words = row["prompt"][0]["content"].rstrip("?").split()
    return int(words[2]), int(words[4])


def test_the_model_is_small_and_fits_vllms_cpu_attention():
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "model")
    assert 0.5e6 < model.num_parameters() < 1.5e6
    assert model.config.hidden_size // model.config.num_attention_heads >= 32
    assert sum(f.stat().st_size for f in (FOLDER / "model").iterdir()) <= 4 << 20


@pytest.mark.parametrize("split", ["train", "test"])
def test_solutions_are_right(split):
    assert all(row["solution"] == str(sum(numbers(row))) for row in rows(split))


def test_no_held_out_sum_is_trained_on_in_either_order():
    trained = {tuple(sorted(numbers(row))) for row in rows("train")}
    held_out = {tuple(sorted(numbers(row))) for row in rows("test")}
    assert len(held_out) == 400
    assert not trained & held_out


def test_the_data_are_those_of_the_script(tmp_path):
    train, test = load("pretrain").split(0)
    assert [numbers(row) for row in rows("train")] == train
    assert [numbers(row) for row in rows("test")] == test


def test_the_tokenizer_renders_a_chat():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model")
    ids = tokenizer.apply_chat_template(rows("test")[0]["prompt"], add_generation_prompt=True, return_dict=False)
    a, b = numbers(rows("test")[0])
    expected = ["<user>", "What", "is", *str(a), "+", *str(b), "?", "<end>", "<assistant>"]
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert (
        tokenizer.decode(tokenizer.convert_tokens_to_ids(["1", "8", "5", "<end>"]), skip_special_tokens=True) == "185"
    )


def test_the_reward_knows_right_from_wrong():
    completions = [[{"role": "assistant", "content": text}] for text in ("85", " 85 ", "58", "", "850", "85?")]
    assert load("reward").correct(completions=completions, solution=["85"] * 6) == [1, 1, 0, 0, 0, 0]


def test_the_pupil_is_careless_with_carries_alone():
    pretrain = load("pretrain")
    import random

    rng = random.Random(0)
    assert all(pretrain.pupil((12, 13), rng) == 25 for _ in range(50))
    assert {pretrain.pupil((47, 38), rng) for _ in range(50)} == {85, 75}
    assert {pretrain.pupil((44, 44), rng) for _ in range(50)} == {88, 98}
