"""Each trainer learns the quickstart's task, with vLLM in this process and with vLLM in a server."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path

import engines
import pytest
import torch
from datasets import Dataset
from serving.servers import start_server
from transformers import AutoTokenizer

import slipstream

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
STEPS = 20
# 128 completions, or 128 pairs, a step.
GROUPS = {"per_device_train_batch_size": 128, "num_generations": 8, "beta": 0.001}
PAIRS = {"per_device_train_batch_size": 128, "beta": 0.1}
TRAINERS = {
    "GRPO": GROUPS,
    "RLOO": GROUPS,
    "OnlineDPO": PAIRS,
    "NashMD": PAIRS | {"beta": 0.01},
    "XPO": PAIRS,
}
PAIRWISE = ("OnlineDPO", "NashMD", "XPO")


def rows(split, count):
    lines = (QUICKSTART / "data" / f"{split}.jsonl").read_text().splitlines()[:count]
    return Dataset.from_list([json.loads(line) for line in lines])


def load_correct():
    spec = importlib.util.spec_from_file_location("quickstart_reward", QUICKSTART / "reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.correct


def preferences(model):
    """Log-probabilities (200, 2) of the right answer to each held-out sum, and of the one that forgets to carry."""
    tokenizer, model = AutoTokenizer.from_pretrained(QUICKSTART / "model"), model.eval()
    values = []
    for row in rows("test", 200):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        for answer in (row["solution"], str(int(row["solution"]) - 10)):
            ids = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
            values.append(engines.logprobs(model, prompt, ids).sum())
    return torch.stack(values).view(-1, 2)


@pytest.fixture(scope="module")
def first_preferences():
    """Those of the model before it is trained, which is the reference."""
    return preferences(engines.policy(QUICKSTART / "model"))


def near(completions, solution, **_):
    """How near the answer is: 1 for the right one. Of two wrong ones, one is better; `correct` knows no such pairs."""
    answers = [messages[-1]["content"].strip() for messages in completions]
    numbers = [int(answer) if answer.isdecimal() else 10_000 for answer in answers]
    return [1 / (1 + abs(number - int(right))) for number, right in zip(numbers, solution, strict=True)]


@pytest.fixture(scope="module")
def server():
    options = ("--max-model-len", "32", "--max-num-seqs", "256", "--reference")
    started = start_server(QUICKSTART / "model", *options)
    yield started
    started.stop()


def assert_preferences(name, mode, before, after, beta):
    """Of pairs that do not change, the right answer is preferred more often, and its implicit reward rises."""
    prefers = [(logps[:, 0] > logps[:, 1]).float().mean().item() for logps in (before, after)]
    rewards = beta * (after - before)  # the first model is the reference
    chosen, margins = rewards[:, 0], rewards[:, 0] - rewards[:, 1]
    print(
        f"{name} {mode}: right preferred {prefers[0]:.2f} -> {prefers[1]:.2f}; chosen reward median "
        f"{chosen.median():+.4f}, mean {chosen.mean():+.4f}; margin median {margins.median():+.4f}"
    )
    assert prefers[1] > prefers[0] + 0.15
    # Not the mean: of the sums that it still gets wrong, the policy has become surer.
    assert chosen.median() > 0.05 * beta
    assert margins.median() > 0.3 * beta


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "colocate") for name in TRAINERS),
        # What differs between the trainers is on this side of the server; test_server_mode compares GRPO's runs.
        *(pytest.param(name, "server", marks=pytest.mark.slow) for name in TRAINERS),
    ],
)
def test_it_learns_to_add(request, tmp_path, monkeypatch, first_preferences, name, mode):
    where = {"vllm_mode": mode}
    if mode == "server":
        server = request.getfixturevalue("server")
        monkeypatch.setenv("SLIPSTREAM_API_KEY", server.key)
        where["vllm_server_base_url"] = server.url
    args = getattr(slipstream, f"{name}Config")(
        str(tmp_path), use_vllm=True, vllm_max_model_length=32, max_completion_length=4, temperature=1.0,
        max_steps=STEPS, learning_rate=2e-4, lr_scheduler_type="constant_with_warmup", warmup_steps=5, adam_beta2=0.99,
        eval_strategy="steps", eval_steps=STEPS, eval_on_start=True, eval_temperature=0.0, gradient_checkpointing=False,
        logging_steps=1, reward_weights=[1.0, 0.0], report_to=[], save_strategy="no", disable_tqdm=True,
        html_report=False, **where, **TRAINERS[name],
    )  # fmt: skip
    trainer = getattr(slipstream, f"{name}Trainer")(
        str(QUICKSTART / "model"), reward_funcs=[near, load_correct()], args=args, train_dataset=rows("train", 4000),
        eval_dataset=rows("test", 200),
    )  # fmt: skip
    trainer.train()
    trainer.close()
    log = trainer.state.log_history
    before, after = (entry["eval_rewards/correct/mean"] for entry in log if "eval_loss" in entry)
    rewards = [entry["reward"] for entry in log if "reward" in entry]
    assert before < 0.35
    assert after > before + 0.2
    # Which prompts come is chance, and some are easier.
    assert statistics.mean(rewards[-5:]) > statistics.mean(rewards[:5])
    if name in PAIRWISE:
        assert_preferences(name, mode, first_preferences, preferences(trainer.model), TRAINERS[name]["beta"])
    if name in ("OnlineDPO", "XPO"):
        # The better one of a pair becomes likelier than the reference has it.
        for metric in ("rewards/chosen", "rewards/accuracies"):
            values = [entry[metric] for entry in log if metric in entry]
            assert values[0] == pytest.approx(0, abs=1e-4), metric
            assert statistics.mean(values[-5:]) > 0.02, metric
