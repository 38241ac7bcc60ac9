"""GRPO end to end on a tiny model: real vLLM in this process, real training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from slipstream import GRPOConfig, GRPOTrainer

ROWS = [
    {"prompt": [{"role": "user", "content": f"{a}+{b}=?"}], "solution": str(a + b)} for a in range(8) for b in range(8)
]


def digits(completions, **_):
    """The share of digits: something a random model can learn within seconds."""
    return [sum(c.isdigit() for c in m[0]["content"]) / 8 for m in completions]


def make(model, folder, *, reward=digits, dataset=None, evaluate=None, peft_config=None, **values):
    settings = {
        "use_vllm": True, "vllm_max_model_length": 64, "max_completion_length": 8, "per_device_train_batch_size": 32,
        "num_generations": 8, "max_steps": 2, "logging_steps": 1, "learning_rate": 3e-3, "report_to": [],
        "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "html_report": False,
    } | values  # fmt: skip
    args = GRPOConfig(output_dir=str(folder), **settings)
    rows = Dataset.from_list(ROWS) if dataset is None else dataset
    return GRPOTrainer(model, reward, args, rows, evaluate, peft_config=peft_config)


@pytest.fixture
def trained(tiny_model, tmp_path):
    """A function that makes a trainer, trains, and closes its engine at the end of the test."""
    made = []

    def train(model=tiny_model, folder=tmp_path, resume=None, **values):
        made.append(make(model, folder, **values))
        made[-1].train(resume_from_checkpoint=resume)
        made[-1].close()
        return made[-1]

    yield train
    for trainer in made:
        trainer.close()


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()])


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class TestColocate:
    @pytest.fixture(scope="class")
    def run(self, tiny_model, tmp_path_factory):
        folder = tmp_path_factory.mktemp("grpo")
        trainer = make(
            tiny_model, folder, max_steps=25, html_report=True, beta=0.02, eval_strategy="steps", eval_steps=25,
            eval_on_start=True, eval_temperature=0.0, num_generations_eval=1,
            evaluate=Dataset.from_list(ROWS[:12]),
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        yield trainer
        trainer.close()

    def test_it_learns(self, run):
        rewards = history(run, "reward")
        assert len(rewards) == 25
        assert rewards[0] < 0.2
        assert rewards[-1] > 0.6

    def test_evaluation_is_greedy_and_improves(self, run):
        before, after = history(run, "eval_rewards/digits/mean")
        assert before < 0.3 < 0.9 < after
        assert history(run, "eval_completions/mean_length")

    def test_sampler_and_trainer_agree(self, run):
        assert max(history(run, "sampling/sampling_logp_difference/max")) < 1e-4
        assert max(abs(r - 1) for r in history(run, "sampling/importance_sampling_ratio/max")) < 1e-3
        assert set(history(run, "sampling/masked_fraction")) == {0.0}

    def test_every_metric_is_logged(self, run):
        expected = {
            "num_tokens", "step_time", "reward", "reward_std", "frac_reward_zero_std", "rewards/digits/mean",
            "rewards/digits/std", "kl", "entropy", "loss", "grad_norm", "learning_rate",
            *(f"completions/{k}_length" for k in ("mean", "min", "max")),
            *(f"completions/{k}_terminated_length" for k in ("mean", "min", "max")), "completions/clipped_ratio",
            *(f"sampling/sampling_logp_difference/{k}" for k in ("mean", "max")),
            *(f"sampling/importance_sampling_ratio/{k}" for k in ("min", "mean", "max")), "sampling/masked_fraction",
            *(f"clip_ratio/{k}" for k in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")),
            *(f"time/{k}" for k in ("generate", "score", "train", "sync")), "sync/bytes", "sync/seconds",
            "staleness/mean", "staleness/max",
        }  # fmt: skip
        logged = [entry for entry in run.state.log_history if "loss" in entry]
        assert [expected - set(entry) for entry in logged] == [set()] * 25
        # The evaluation before the first step has already sent the weights.
        assert [entry["time/sync"] > 0 for entry in logged] == [False, *[True] * 24]

    def test_kl_starts_at_zero_and_grows(self, run):
        kl = history(run, "kl")
        assert kl[0] == pytest.approx(0, abs=1e-6)
        assert kl[-1] > 0.1

    def test_weights_are_sent_once_an_update(self, run):
        nbytes = sum(p.nbytes for p in run.model.parameters())
        assert history(run, "sync/bytes")[1:] == [nbytes] * 24
        assert run.engine.version == 25

    def test_tokens_are_counted(self, run):
        # 32 rows a step: 8 prompt tokens and at most 8 completion tokens each.
        counted = history(run, "num_tokens")
        assert 25 * 32 * 9 <= counted[-1] <= 25 * 32 * 16
        assert counted == sorted(counted)

    def test_completions_and_report_are_written(self, run):
        rows = [json.loads(line) for line in (Path(run.args.output_dir) / "completions.jsonl").open()]
        assert {r["mode"] for r in rows} == {"train", "eval"}
        assert all(r["weight_version"] == r["step"] - 1 for r in rows if r["mode"] == "train")
        assert all(r["weight_version"] == r["step"] for r in rows if r["mode"] == "eval")
        page = (Path(run.args.output_dir) / "report.html").read_text()
        assert "0+0=?" in page or "1+1=?" in page

    def test_the_saved_model_loads(self, run):
        model = AutoModelForCausalLM.from_pretrained(run.args.output_dir)
        assert torch.equal(weights(run), torch.cat([p.flatten() for p in model.parameters()]))
        assert AutoTokenizer.from_pretrained(run.args.output_dir).chat_template

    def test_the_engine_follows_weights_that_were_changed_by_hand(self, run):
        run.push_weights()
        sent = history(run, "sync/bytes")
        run.metrics.flush()
        run.push_weights()
        assert run.metrics.flush() == {}, "nothing changed, nothing is sent"
        with torch.no_grad():
            next(run.model.parameters()).mul_(1.0)
        run.push_weights()
        assert run.metrics.flush()["sync/bytes"] == sent[-1]


def test_transformers_generates_without_vllm(trained):
    trainer = trained(use_vllm=False, max_steps=12)
    rewards = history(trainer, "reward")
    assert rewards[-1] > rewards[0] + 0.3
    assert not history(trainer, "sampling/importance_sampling_ratio/mean")


def test_the_split_into_micro_batches_changes_nothing(trained):
    """The same seed gives the same rollouts, so one step must give the same weights however it is cut."""
    whole = weights(trained(max_steps=1, optim="sgd", learning_rate=1.0))
    for size, steps in ((8, 4), (4, 8)):
        split = trained(max_steps=1, optim="sgd", learning_rate=1.0, per_device_train_batch_size=size,
                        gradient_accumulation_steps=steps)  # fmt: skip
        assert (weights(split) - whole).abs().max() < 1e-6


def test_a_generation_batch_is_used_for_several_steps(tiny_model, tmp_path):
    versions = []
    trainer = make(
        tiny_model, tmp_path, max_steps=8, per_device_train_batch_size=8, steps_per_generation=2, num_iterations=2
    )

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            versions.append(trainer.engine.version)

    trainer.add_callback(Watch())
    trainer.train()
    trainer.close()
    assert versions == [0, 0, 0, 0, 4, 4, 4, 4]
    # After the first of four steps the policy has moved away from the one that sampled.
    ratios = history(trainer, "clip_ratio/region_mean")
    assert ratios[0] == 0
    assert max(ratios[1:4]) > 0


def test_resuming_continues_the_run(trained, tmp_path):
    whole = trained(folder=tmp_path / "whole", max_steps=4)
    trained(folder=tmp_path / "cut", max_steps=4, save_strategy="steps", save_steps=2)
    resumed = trained(folder=tmp_path / "cut", max_steps=4, resume=str(tmp_path / "cut" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(resumed))
    assert history(whole, "reward") == history(resumed, "reward")


def test_an_adapter_is_trained_beside_its_frozen_base(trained, tiny_model):
    from peft import LoraConfig

    adapter = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trained(peft_config=adapter, max_steps=15, beta=0.01, learning_rate=2e-2)
    rewards, kl = history(trainer, "reward"), history(trainer, "kl")
    assert rewards[-1] > rewards[0] + 0.3
    # The reference is the base model with the adapter off: the same at first, not later.
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 0.01
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    now = trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(base.model.layers[0].self_attn.q_proj.weight, now)
    assert max(history(trainer, "sampling/sampling_logp_difference/max")) < 1e-4


def test_a_model_can_be_given_as_a_module(trained, tiny_model):
    """Its weights are not those of any file: the engine must still sample from them."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    trainer = trained(model=model)
    assert max(history(trainer, "sampling/sampling_logp_difference/max")) < 1e-4


def test_rows_that_cannot_be_scored_teach_nothing(trained, tiny_model):
    def never(completions, **_):
        return [None] * len(completions)

    trainer = trained(reward=never, max_steps=1)
    untouched = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert torch.equal(torch.cat([p.flatten() for p in untouched.parameters()]), weights(trainer))
    assert history(trainer, "reward") == [None]


def test_errors_of_a_reward_function_reach_the_caller(tiny_model, tmp_path):
    def broken(completions, **_):
        return [1.0]

    trainer = make(tiny_model, tmp_path, reward=broken)
    try:
        with pytest.raises(ValueError, match="'broken' returned 1 values for 32 completions"):
            trainer.train()
    finally:
        trainer.close()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset": Dataset.from_list(ROWS[:3])}, "3 rows, but one generation batch needs 4"),
        ({"dataset": Dataset.from_list([{"text": "a"}] * 9)}, "no column 'prompt'; its columns are 'text'"),
        ({"dataset": iter(ROWS)}, "streaming datasets are not supported"),
        ({"evaluate": Dataset.from_list([{"text": "a"}])}, "eval_dataset has no column 'prompt'"),
        ({"reward": None}, "reward_funcs is missing"),
        ({"reward": []}, "reward_funcs is missing"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 values for 1 reward_funcs"),
    ],
)
def test_bad_input_is_an_error_before_a_model_loads(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        make("no/such-model-anywhere", tmp_path, **values)
