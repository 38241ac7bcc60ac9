"""A sequence-classification model as the reward: by its name, or as a module, beside functions."""

from __future__ import annotations

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen2ForSequenceClassification

from slipstream import GRPOConfig, GRPOTrainer
from slipstream.records import Completion, Prompt, Rollout
from slipstream.rollouts.reward_models import load_reward
from slipstream.rollouts.rewards import RewardRunner

CHAT = [{"prompt": [{"role": "user", "content": f"{a}+{b}=?"}]} for a in range(4) for b in range(4)]
PLAIN = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Folder of a tiny random reward model."""
    return str(tiny.build_reward_model(tmp_path_factory.mktemp("models") / "judge"))


def train(model, folder, rewards, rows, **options):
    args = GRPOConfig(
        str(folder), max_completion_length=6, per_device_train_batch_size=8, num_generations=4, max_steps=1,
        logging_steps=1, report_to=[], disable_tqdm=True, html_report=False, save_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(model, rewards, args, Dataset.from_list(rows), **options)
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "reward" in entry)


def test_a_folder_without_a_model_is_named():
    with pytest.raises(OSError, match="reward_funcs holds '/nowhere/judge', and no sequence-classification model"):
        load_reward("/nowhere/judge", None, torch.device("cpu"))


def test_a_model_without_a_trained_head_is_refused(tiny_model):
    """transformers would draw the head at random, and the policy would learn what that likes."""
    with pytest.raises(ValueError, match=r"reward_funcs holds .*tiny.* no weights for score\.weight"):
        load_reward(str(tiny_model), None, torch.device("cpu"))


def test_a_model_of_zeros_is_refused(judge):
    """What transformers makes on ranks that are to be given their weights."""
    model = Qwen2ForSequenceClassification.from_pretrained(judge)
    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.raises(ValueError, match="all weights of the Qwen2ForSequenceClassification are 0"):
        load_reward(model, None, torch.device("cpu"))


def test_scores_are_logit_zero_of_prompt_and_completion(judge):
    model, tokenizer = load_reward(judge, None, torch.device("cpu"))
    texts = ["4", "I think it is 5", ""]
    rows = [
        Rollout(Prompt([1], CHAT[i], i), Completion([1], None, 0, "stop"), [{"role": "assistant", "content": t}], False)
        for i, t in enumerate(texts)
    ] + [Rollout(Prompt([1], PLAIN[9], 9), Completion([1], None, 0, "stop"), "17", False)]
    RewardRunner([model], [tokenizer]).score(rows)
    rendered = [f"<user>{CHAT[i]['prompt'][0]['content']}<end><assistant>{t}<end>" for i, t in enumerate(texts)]
    for row, text in zip(rows, [*rendered, "2+1=17"], strict=True):
        alone = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0].item()
        assert row.rewards == [pytest.approx(alone, abs=1e-5)]
    assert len({row.rewards[0] for row in rows}) == 4


@pytest.mark.parametrize("rows", [CHAT, PLAIN], ids=["chat", "plain"])
def test_a_name_trains(tiny_model, tmp_path, judge, rows):
    logged = train(tiny_model, tmp_path, judge, rows)
    assert logged["reward"] == logged["rewards/judge/mean"] != 0


def test_a_module_stands_beside_a_function(tiny_model, tmp_path, judge):
    def length(completions, **_):
        return [float(len(text)) for text in completions]

    model = Qwen2ForSequenceClassification.from_pretrained(judge)
    tokenizer = AutoTokenizer.from_pretrained(judge)
    logged = train(tiny_model, tmp_path, [length, model], PLAIN, reward_processing_classes=[None, tokenizer])
    assert logged["reward"] == pytest.approx(logged["rewards/length/mean"] + logged["rewards/judge/mean"], rel=1e-5)
    assert all(not p.requires_grad or p.grad is None for p in model.parameters())
