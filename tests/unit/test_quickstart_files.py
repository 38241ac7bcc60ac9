"""The quickstart's files: data, model and reward, as they are in the repository."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def rows(split: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLE / "data" / f"{split}.jsonl").read_text().splitlines()]


def numbers(row: dict) -> tuple[int, int]:
    found = re.fullmatch(r"What is (\d\d) \+ (\d\d)\?", row["prompt"][0]["content"])
    assert found, row
    return int(found[1]), int(found[2])


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EXAMPLE / "model")


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(EXAMPLE / "model").eval()


def answers(model, tokenizer, prompts: list[list[dict[str, str]]]) -> list[list[dict[str, str]]]:
    """The model's greedy answers, as conversations."""
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    with torch.no_grad():
        made = model.generate(**inputs, do_sample=False, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    return [[{"role": "assistant", "content": t}] for t in tokenizer.batch_decode(made, skip_special_tokens=True)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_conversations_with_the_right_solution(split):
    for row in rows(split):
        assert set(row) == {"prompt", "solution"}
        assert [message["role"] for message in row["prompt"]] == ["user"]
        assert row["solution"] == str(sum(numbers(row)))


def test_no_held_out_sum_is_in_the_training_set_in_either_order():
    train = [numbers(row) for row in rows("train")]
    test = {frozenset(numbers(row)) for row in rows("test")}
    assert 200 <= len(test) == len(rows("test")) <= 500
    assert len(set(train)) == len(train)
    assert not test & {frozenset(pair) for pair in train}


def test_the_script_makes_these_data_again(tmp_path, monkeypatch):
    pretrain = load("pretrain")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--out", str(tmp_path), "--steps", "0"])
    pretrain.main()
    for split in ("train", "test"):
        name = f"{split}.jsonl"
        assert (tmp_path / "data" / name).read_bytes() == (EXAMPLE / "data" / name).read_bytes()


def test_the_model_is_small_and_fits_the_cpu_engine(model):
    assert (EXAMPLE / "model" / "model.safetensors").stat().st_size <= 4_000_000
    assert 0.8e6 <= sum(p.numel() for p in model.parameters()) <= 1.05e6
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    heads = model.config.num_attention_heads
    assert (getattr(model.config, "head_dim", None) or model.config.hidden_size // heads) >= 32


def test_the_chat_template_renders_a_prompt_and_reads_an_answer_back(tokenizer):
    text = tokenizer.apply_chat_template(rows("test")[0]["prompt"], add_generation_prompt=True, tokenize=False)
    assert text == f"<user>{rows('test')[0]['prompt'][0]['content']}<end><assistant>"
    ids = tokenizer("105<end>", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "105"
    assert tokenizer.unk_token_id not in tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_model_is_right_on_20_to_40_percent_of_the_held_out_problems(model, tokenizer):
    test = rows("test")
    prompts = [row["prompt"] for row in test]
    made = answers(model, tokenizer, prompts)
    rewards = load("reward").correct(prompts=prompts, completions=made, solution=[row["solution"] for row in test])
    assert 0.20 <= sum(rewards) / len(rewards) <= 0.40


@pytest.mark.parametrize(
    ("content", "reward"),
    [("85", 1.0), (" 85", 1.0), ("84", 0.0), ("185", 0.0), ("8", 0.0), ("", 0.0), ("85 86", 0.0), ("What 85", 0.0)],
)
def test_the_reward_is_one_for_the_right_answer_alone(content, reward):
    completions = [[{"role": "assistant", "content": content}], [{"role": "assistant", "content": "47"}]]
    found = load("reward").correct(
        prompts=[[]] * 2, completions=completions, completion_ids=[[1], [2]], solution=["85", "47"], trainer_state=None
    )
    assert found == [reward, 1.0]


def test_the_reward_refuses_columns_of_another_length():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        load("reward").correct(completions=[[{"role": "assistant", "content": "1"}]], solution=["1", "2"])


def test_the_configuration_is_valid_and_fits_the_model(tokenizer, tmp_path):
    from slipstream import GRPOConfig
    from slipstream.commands.train import parse_settings

    settings = yaml.safe_load((EXAMPLE / "grpo.yaml").read_text()) | {"output_dir": str(tmp_path)}
    run, args = parse_settings(settings, GRPOConfig)
    assert run.reward_funcs == ["examples/quickstart/reward.py:correct"]
    assert args.use_vllm
    assert args.eval_temperature == 0.0
    longest = max(len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False))
                  for row in rows("test"))  # fmt: skip
    assert args.max_completion_length >= 4  # three digits and the end
    assert longest + args.max_completion_length <= args.vllm_max_model_length
