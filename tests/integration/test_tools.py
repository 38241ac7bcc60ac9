"""Rollouts in which the model calls tools, with transformers' own generation."""

from __future__ import annotations

import calling
import pytest
import torch
from calling import CONVERSATIONS, ROWS, add
from datasets import Dataset

from slipstream import GRPOConfig, GRPOTrainer


def make(model, folder, reward=None, tools=(add,), rows=ROWS, environment_factory=None, **values):
    settings = {
        "max_completion_length": 120, "per_device_train_batch_size": 6, "num_generations": 2, "max_steps": 1,
        "logging_steps": 1, "learning_rate": 1e-3, "report_to": [], "gradient_checkpointing": False,
        "save_strategy": "no", "disable_tqdm": True, "html_report": False, "temperature": 0.2,
    } | values  # fmt: skip
    args = GRPOConfig(output_dir=str(folder), **settings)
    rows = Dataset.from_list(rows)
    return GRPOTrainer(
        model, reward or (lambda completions, **_: [float(len(c)) for c in completions]), args, rows, rows,
        processing_class=calling.tokenizer(), tools=list(tools), environment_factory=environment_factory,
    )  # fmt: skip


def sampled(trainer, rows=(0, 1, 2), evaluation=False):
    """The rollouts of these rows of the dataset, one of each."""
    wanted = [(row, 0, 1) for row in rows]
    return trainer._generate(trainer.train_dataset, wanted, (0, "test"), evaluation=evaluation)


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.fixture(scope="module")
def trainer(calling_model, tmp_path_factory):
    made = make(calling_model, tmp_path_factory.mktemp("run"), temperature=0.01)
    yield made
    made.close()


def test_tokens_are_those_of_the_whole_conversation(trainer):
    words = trainer.processing_class
    for rollout, (prompt, answers) in zip(sampled(trainer), CONVERSATIONS.values(), strict=True):
        assert rollout.text == answers
        whole = words.apply_chat_template([*prompt, *answers], tools=calling.schemas(), return_dict=False)
        ids = rollout.prompt.ids + rollout.completion.ids
        assert whole[: len(ids)] == ids
        assert words.decode(whole[len(ids) :]) == "\n"
        assert not rollout.truncated


def test_only_its_own_tokens_are_in_the_loss(trainer):
    words = trainer.processing_class
    for rollout, (_, answers) in zip(sampled(trainer), CONVERSATIONS.values(), strict=True):
        mask, ids = rollout.extra["loss_mask"].bool(), torch.tensor(rollout.completion.ids)
        own = words.apply_chat_template([a for a in answers if a["role"] == "assistant"], tokenize=False)
        assert words.decode(ids[mask]) == own.replace("<assistant>", "").replace("\n", "")
        between = "\n<tool>3<end>\n<assistant>"
        assert words.decode(ids[~mask]) == between * sum(a["role"] == "tool" for a in answers)
        assert rollout.own_tokens == mask.sum()
        assert rollout.extra["sampler_logps"].isnan().equal(~mask) if "sampler_logps" in rollout.extra else True


def test_reward_functions_see_messages_and_metrics_count_calls(calling_model, tmp_path):
    seen = []

    def reward(prompts, completions, completion_ids, calls, **_):
        seen.extend(zip(prompts, completions, calls, strict=True))
        return [float(len(c)) for c in completions]

    trainer = make(calling_model, tmp_path, reward, eval_strategy="steps", eval_steps=1, temperature=0.01)
    trainer.train()
    trainer.close()
    for prompt, completion, calls in seen[:6]:
        assert completion == CONVERSATIONS[prompt[0]["content"]][1]
        assert sum(m["role"] == "tool" for m in completion) == calls
    assert history(trainer, "tools/call_frequency") == [1.0]
    assert history(trainer, "tools/failure_frequency") == [0.0]
    assert history(trainer, "eval_tools/failure_frequency") == [0.0]
    assert history(trainer, "eval_reward")
    text = (tmp_path / "completions.jsonl").read_text()
    assert r"→ add({\"a\": 1, \"b\": 2})\n← add: 3\nok" in text


def test_a_run_learns_to_call(calling_model, tmp_path):
    def reward(completions, **_):
        return [float(any(m["role"] == "tool" for m in c)) for c in completions]

    trainer = make(
        calling_model, tmp_path, reward, temperature=1.0, max_steps=12, learning_rate=3e-4,
        per_device_train_batch_size=24, num_generations=24, rows=[{"prompt": calling.EITHER[0][0]}],
    )  # fmt: skip
    trainer.train()
    trainer.close()
    calls = history(trainer, "tools/call_frequency")
    assert sum(calls[-3:]) / 3 > sum(calls[:2]) / 2 + 0.2, calls
