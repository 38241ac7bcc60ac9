"""The documented snippets of RLOO, Online DPO, Nash-MD and XPO, and their completions, with vLLM in this process."""

from __future__ import annotations

import datasets
import pytest
import torch
from engines import greedy
from rounds import adapter, history, load, make

from slipstream.rewards import accuracy_reward

SUMS = [(a, b) for a in range(4) for b in range(4)]
ROWS = [{"prompt": [{"role": "user", "content": f"{a}+{b}=?"}], "solution": f"${a + b}$"} for a, b in SUMS]
BY_REWARD = """
from datasets import load_dataset
from {module} import {name}Config, {name}Trainer
from slipstream.rewards import accuracy_reward

dataset = load_dataset("trl-lib/DeepMath-103K", split="train")

training_args = {name}Config(output_dir="Qwen3-0.6B-{name}", use_vllm=True, vllm_mode="colocate")
trainer = {name}Trainer(
    model="Qwen/Qwen3-0.6B",
    args=training_args,
    reward_funcs=accuracy_reward,
    train_dataset=dataset,
)
trainer.train()
"""
BY_JUDGE = """
from datasets import load_dataset
from slipstream.experimental.judges import BasePairwiseJudge
from {module} import {name}Config, {name}Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

class ShorterJudge(BasePairwiseJudge):
    def judge(self, prompts, completions, shuffle_order=True):
        return [int(len(second[0]["content"]) < len(first[0]["content"])) for first, second in completions]

model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")
judge = ShorterJudge()
train_dataset = load_dataset("trl-lib/DeepMath-103K", split="train")

training_args = {name}Config(output_dir="Qwen3-0.6B-{name}", use_vllm=True, vllm_mode="colocate")
trainer = {name}Trainer(
    model=model, judge=judge, args=training_args, processing_class=tokenizer, train_dataset=train_dataset
)
trainer.train()
"""
PLACES = {
    "RLOO": "slipstream", "OnlineDPO": "slipstream.experimental.online_dpo",
    "NashMD": "slipstream.experimental.nash_md", "XPO": "slipstream.experimental.xpo",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "snippet"),
    [*((name, BY_REWARD) for name in PLACES), ("NashMD", BY_JUDGE), ("XPO", BY_JUDGE)],
    ids=lambda v: "by judge" if v == BY_JUDGE else "by reward" if v == BY_REWARD else v,
)
def test_a_documented_snippet_trains(tiny_model, tmp_path, monkeypatch, name, snippet):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(ROWS))
    code = snippet.format(name=name, module=PLACES[name])
    code = code.replace('"Qwen/Qwen3-0.6B"', repr(str(tiny_model)))
    smaller = f"output_dir={str(tmp_path)!r}, max_steps=1, max_completion_length=8, report_to=[], save_strategy='no', "
    code = code.replace(f'output_dir="Qwen3-0.6B-{name}", ', smaller)
    names: dict = {}
    exec(compile(code, "snippet.py", "exec"), names)
    trainer = names["trainer"]
    try:
        assert trainer.state.global_step == 1
        assert trainer.engine.version == 0, "vLLM sampled with the weights it was sent"
        assert trainer.args.vllm_max_model_length == (None if name == "RLOO" else 512)
        if snippet == BY_REWARD:
            assert trainer.rewards.functions == [accuracy_reward]
    finally:
        trainer.close()


@pytest.mark.parametrize("adapted", [False, True], ids=["a model", "an adapter"])
def test_xpo_compares_with_the_reference_after_updates_too(tiny_model, tmp_path, adapted):
    arguments = {"peft_config": adapter()} if adapted else {}
    trainer = make("XPO", tiny_model, tmp_path, use_vllm=True, max_steps=3, eval_temperature=0.0, arguments=arguments)
    try:
        trainer.train()
        rollouts, _ = trainer._collect(trainer.train_dataset, [(i, 0, 2) for i in range(4)], ("seed",), 2, 8)
        base, end = load(tiny_model), trainer.eos_ids
        with torch.no_grad():
            for own, other in zip(rollouts[::2], rollouts[1::2], strict=True):
                assert other.completion.ids == greedy(base, other.prompt.ids, 8, end)
                assert own.completion.ids == greedy(trainer.model, own.prompt.ids, 8, end)
        assert any(a.completion.ids != b.completion.ids for a, b in zip(rollouts[::2], rollouts[1::2], strict=True))
        assert trainer._reference_pushed
        assert history(trainer, "objective/kl")[-1] != 0
    finally:
        trainer.close()


def test_a_policy_that_plays_against_itself_needs_no_second_model(tiny_model, tmp_path):
    trainer = make("NashMD", tiny_model, tmp_path, use_vllm=True, mixture_coef=0.0)
    try:
        trainer.train()
        assert not trainer._reference_pushed
        with pytest.raises(ValueError, match="made without a reference model"):
            trainer.engine.update_reference([])
    finally:
        trainer.close()
