"""The snippet that TRL documents for each trainer trains when `trl` is replaced, in this process and with a server."""

from __future__ import annotations

import math
import re

import datasets
import pytest
import tiny
from serving.servers import start_server

BY_REWARD = """
from datasets import load_dataset
from {module} import {name}Config, {name}Trainer
from trl.rewards import accuracy_reward

dataset = load_dataset("trl-lib/DeepMath-103K", split="train")

training_args = {name}Config(output_dir="Qwen3-0.6B-{name}", use_vllm=True, vllm_mode="{mode}")
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
from {module} import {name}Config, {name}Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.judges import BasePairwiseJudge

class ShorterJudge(BasePairwiseJudge):
    def judge(self, prompts, completions, shuffle_order=True):
        return [int(len(second[0]["content"]) < len(first[0]["content"])) for first, second in completions]

model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")
train_dataset = load_dataset("trl-lib/ultrafeedback-prompt", split="train")

training_args = {name}Config(output_dir="Qwen3-0.6B-{name}", use_vllm=True, vllm_mode="{mode}")
trainer = {name}Trainer(
    model=model, judge=ShorterJudge(), args=training_args, processing_class=tokenizer, train_dataset=train_dataset
)
trainer.train()
"""
BY_MODEL = """
from datasets import load_dataset
from {module} import {name}Config, {name}Trainer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")
reward_model = AutoModelForSequenceClassification.from_pretrained("trl-lib/Qwen2-0.5B-Reward", num_labels=1)
reward_tokenizer = AutoTokenizer.from_pretrained("trl-lib/Qwen2-0.5B-Reward")
train_dataset = load_dataset("trl-lib/ultrafeedback-prompt", split="train")

training_args = {name}Config(output_dir="Qwen3-0.6B-{name}", use_vllm=True, vllm_mode="{mode}")
trainer = {name}Trainer(
    model=model, reward_funcs=reward_model, args=training_args, train_dataset=train_dataset,
    processing_class=tokenizer, reward_processing_classes=reward_tokenizer,
)
trainer.train()
"""
SNIPPETS = {"a reward function": BY_REWARD, "a judge": BY_JUDGE, "a reward model": BY_MODEL}
MODULES = {
    "GRPO": "trl", "RLOO": "trl", "OnlineDPO": "trl.experimental.online_dpo", "NashMD": "trl.experimental.nash_md",
    "XPO": "trl.experimental.xpo",
}  # fmt: skip
PAIRWISE = ("OnlineDPO", "NashMD", "XPO")
SUMS = [(a, b) for a in range(4) for b in range(4)]
ROWS = [{"prompt": [{"role": "user", "content": f"{a}+{b}=?"}], "solution": f"${a + b}$"} for a, b in SUMS]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """Folder of a tiny random reward model."""
    return tiny.build_reward_model(tmp_path_factory.mktemp("models") / "Qwen2-0.5B-Reward")


@pytest.fixture(scope="module")
def server(tiny_model):
    """One that has a reference, which Nash-MD and XPO sample from; the others leave it alone."""
    started = start_server(tiny_model, "--reference")
    yield started
    started.stop()


@pytest.fixture
def run(tiny_model, reward_model, tmp_path, monkeypatch, request):
    """A function that runs a snippet for two short steps on tiny models, and returns its closed trainer."""
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(ROWS))

    def run_snippet(name: str, scorer: str, mode: str):
        code = SNIPPETS[scorer].format(name=name, module=MODULES[name], mode=mode)
        code = re.sub(r"(?m)^from trl\b", "from slipstream", code)
        places = {"Qwen/Qwen3-0.6B": str(tiny_model), "trl-lib/Qwen2-0.5B-Reward": str(reward_model)}
        for hub, folder in places.items():
            code = code.replace(repr(hub).replace("'", '"'), repr(folder))
        given = f'output_dir="Qwen3-0.6B-{name}", '
        assert given in code
        smaller = f"output_dir={str(tmp_path)!r}, max_steps=2, logging_steps=1, max_completion_length=8, report_to=[], "
        code = code.replace(given, smaller + "save_strategy='no', disable_tqdm=True, html_report=False, ")
        if mode == "server":
            server = request.getfixturevalue("server")
            monkeypatch.setenv("SLIPSTREAM_API_KEY", server.key)
            code = code.replace('vllm_mode="server"', f'vllm_mode="server", vllm_server_port={server.port}')
        names: dict = {}
        exec(compile(code, f"{name}.py", "exec"), names)
        names["trainer"].close()
        return names["trainer"]

    return run_snippet


@pytest.mark.parametrize(
    ("name", "scorer", "mode"),
    [
        *((name, "a reward function", mode) for mode in ("colocate", "server") for name in MODULES),
        ("NashMD", "a judge", "colocate"),
        ("XPO", "a reward model", "server"),
        *(pytest.param(name, "a judge", "colocate", marks=pytest.mark.slow) for name in ("OnlineDPO", "XPO")),
        *(pytest.param(name, "a reward model", "server", marks=pytest.mark.slow) for name in ("OnlineDPO", "NashMD")),
    ],
)
def test_a_documented_snippet_trains(run, name, scorer, mode):
    trainer = run(name, scorer, mode)
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    assert all(math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) for entry in steps)
    assert all(entry["staleness/max"] == 0 for entry in steps), "the second step sampled with what the first had learnt"
    assert all(entry["sync/bytes"] > 0 for entry in steps)
    # A colocated engine gets the length that the pairwise trainers have; a server has its own.
    assert trainer.args.vllm_max_model_length == (512 if name in PAIRWISE and mode == "colocate" else None)
    scores = {"a reward function": "accuracy_reward", "a reward model": "Qwen2-0.5B-Reward"}
    logged = {key for entry in steps for key in entry if re.fullmatch(r"rewards/[^/]+/mean", key)}
    assert logged == ({f"rewards/{scores[scorer]}/mean"} if scorer in scores else set())
    if scorer != "a reward function":  # which may leave rows without a score
        assert all(entry["judgements/failed"] == 0 for entry in steps)
