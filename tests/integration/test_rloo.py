"""RLOO: what is special about it. Transformers generates, except where the engine's probabilities matter."""

from __future__ import annotations

import math

import pytest
import torch
from engines import logprobs
from rounds import ROWS, away, gradient, history, load, make, sample
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from slipstream import RLOOTrainer
from slipstream.trainers.policy_gradient import SAMPLER_CORRECTIONS


def close(a, b, tolerance=1e-6):
    return (a - b).norm() / b.norm() <= tolerance


def count_scoring(trainer):
    """How many forward passes of the policy score tokens (generating ones use the cache)."""
    seen = []
    # A model is looked at once before it is scored for the first time.
    trainer._annotate(trainer.model, trainer._generate(trainer.train_dataset, [(0, 0, 1)], (), evaluation=False), "x")
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(1) if kwargs.get("use_cache") is False else None, with_kwargs=True
    )
    return seen


class TestForwards:
    @pytest.mark.parametrize("beta", [0.0, 0.05])
    def test_on_policy_there_is_one_a_micro_batch(self, tiny_model, tmp_path, beta):
        trainer = make("RLOO", tiny_model, tmp_path, beta=beta, gradient_accumulation_steps=2)
        seen = count_scoring(trainer)
        trainer.train()
        assert len(seen) == 2 * 2

    @pytest.mark.parametrize(
        "values",
        [{"normalize_advantages": True}, {"per_device_train_batch_size": 3, "num_generations": 6,
         "gradient_accumulation_steps": 2}, {"num_iterations": 2}],
        ids=["normalized", "groups in two micro-batches", "off-policy"],
    )  # fmt: skip
    def test_where_the_old_policy_must_be_known_before_there_is_one_more(self, tiny_model, tmp_path, values):
        trainer = make("RLOO", tiny_model, tmp_path, **values)
        seen = count_scoring(trainer)
        trainer.train()
        learning = 2 * trainer.args.gradient_accumulation_steps
        assert len(seen) == learning + learning // (trainer._iterations)

    def test_the_penalty_of_the_same_pass_is_that_of_a_pass_before(self, tiny_model, tmp_path, monkeypatch):
        values = {"beta": 0.3, "num_generations": 4}
        now = make("RLOO", away(tiny_model), tmp_path, **values)
        now.reference = load(tiny_model)
        rollouts = sample(now)
        assert "old_logps" not in rollouts[0].extra
        rollouts[2].rewards = [None]
        now.credit(rollouts, 4, 8)
        loss, together = gradient(now, rollouts)
        monkeypatch.setattr(RLOOTrainer, "keeps_groups", False)
        now._annotate(now.model, rollouts, "old_logps")
        now.credit(rollouts, 4, 8)
        assert rollouts[2].advantage == 0
        before_loss, before = gradient(now, rollouts)
        assert close(together, before, 2e-6)
        assert loss.item() == pytest.approx(before_loss.item(), abs=1e-6)


def test_the_loss_is_the_formula(tiny_model, tmp_path):
    trainer = make("RLOO", away(tiny_model), tmp_path, beta=0.3, num_generations=4, reward_clip_range=(0.05, 0.2))
    trainer.reference = load(tiny_model)
    rollouts = sample(trainer)
    _, got = gradient(trainer, rollouts)
    trainer.model.zero_grad()
    leaves, shaped = [], []
    for r in rollouts:
        ids = torch.tensor([[*r.prompt.ids, *r.completion.ids]])
        policy = trainer.model(ids).logits[0, len(r.prompt.ids) - 1 : -1].log_softmax(-1)
        own = policy.gather(-1, torch.tensor(r.completion.ids)[:, None]).sum()
        reference = logprobs(trainer.reference, r.prompt.ids, r.completion.ids).sum()
        leaves.append(own)
        shaped.append(min(max(r.rewards[0], 0.05), 0.2) - 0.3 * (own.item() - reference.item()))
    loss = 0
    for i, own in enumerate(leaves):
        group = [shaped[j] for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        loss = loss - (shaped[i] - sum(group) / 3) * torch.exp(own - own.detach()) / len(leaves)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert close(got, expected, 2e-5)


@pytest.mark.parametrize("mode", ["off", *SAMPLER_CORRECTIONS])
def test_the_samplers_error_is_corrected(tiny_model, tmp_path, mode):
    """Each token's gradient has the weight that the mode says; naively, in float64."""
    low, high = 0.75, 1.3
    correction = {"vllm_importance_sampling_correction": mode != "off"}
    if mode != "off":
        correction["vllm_importance_sampling_mode"] = mode
    trainer = make("RLOO", away(tiny_model), tmp_path, beta=0.0, num_generations=4, **correction,
                   vllm_importance_sampling_clip_min=low, vllm_importance_sampling_clip_max=high)  # fmt: skip
    rollouts = sample(trainer)
    generator, logps = torch.Generator().manual_seed(1), []
    for r in rollouts:
        ids = torch.tensor([[*r.prompt.ids, *r.completion.ids]])
        policy = trainer.model(ids).logits[0, len(r.prompt.ids) - 1 : -1].double().log_softmax(-1)
        logps.append(policy.gather(-1, torch.tensor(r.completion.ids)[:, None])[:, 0])
        noise = 0.3 * torch.randn(len(r.completion.ids), generator=generator)
        r.extra["sampler_logps"] = logps[-1].detach().float() + noise
    _, got = gradient(trainer, rollouts)
    trainer.model.zero_grad()
    loss, weighted = 0, []
    for i, (rollout, own) in enumerate(zip(rollouts, logps, strict=True)):
        others = [rollouts[j].rewards[0] for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        deltas = (own.detach() - rollout.extra["sampler_logps"].double()).tolist()
        if mode == "off":
            weights = [1.0] * len(deltas)
        else:
            if mode.startswith("token"):
                ratios = [math.exp(delta) for delta in deltas]
            else:
                summed = sum(deltas) / (len(deltas) if "geometric" in mode else 1)
                ratios = [math.exp(summed)] * len(deltas)
            if mode.endswith("truncate"):
                weights = [min(max(ratio, low), high) for ratio in ratios]
            else:
                weights = [ratio if low <= ratio <= high else 0.0 for ratio in ratios]
        weighted += weights
        advantage = rollout.rewards[0] - sum(others) / 3
        loss = loss - advantage * (own * torch.tensor(weights)).sum() / len(rollouts)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert close(got, expected, 2e-5)
    assert len(set(weighted)) > 2 or mode == "off"


def test_a_reward_model_scores(tiny_model, tmp_path):
    scorer = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    arguments = {"reward_funcs": scorer, "reward_processing_classes": tokenizer}
    trainer = make("RLOO", tiny_model, tmp_path, arguments=arguments)
    for rollout in sample(trainer):
        ids = tokenizer(rollout.prompt.row["prompt"] + rollout.text, return_tensors="pt", add_special_tokens=False)
        assert rollout.rewards[0] == pytest.approx(scorer(**ids).logits.item(), abs=1e-5)
    trainer.train()
    assert len(history(trainer, "rewards/tiny/mean")) == 2


def test_a_truncated_row_teaches_nothing(tiny_model, tmp_path):
    trainer = make("RLOO", tiny_model, tmp_path, mask_truncated_completions=True)
    rollouts = sample(trainer)
    assert any(r.truncated for r in rollouts)
    assert [r.in_loss for r in rollouts] == [not r.truncated for r in rollouts]


def test_the_reference_follows_when_asked_to(tiny_model, tmp_path):
    trainer = make("RLOO", tiny_model, tmp_path, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
    trainer.train()
    for ours, theirs in zip(trainer.model.parameters(), trainer.reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class TestVLLM:
    @pytest.fixture(scope="class")
    def run(self, tiny_model, tmp_path_factory):
        trainer = make(
            "RLOO", tiny_model, tmp_path_factory.mktemp("rloo"), use_vllm=True, vllm_max_model_length=64, max_steps=4,
            num_iterations=2, per_device_train_batch_size=16, num_generations=4, evaluate=ROWS[:3],
            eval_strategy="steps", eval_steps=4, num_generations_eval=1, learning_rate=1e-4,
        )  # fmt: skip
        trainer.train()
        yield trainer
        trainer.close()

    def test_every_metric_is_logged(self, run):
        expected = {
            "num_tokens", "step_time", "reward", "reward_std", "frac_reward_zero_std", "rewards/digits/mean",
            "rewards/digits/std", "kl", "entropy", "loss", "grad_norm", "completions/clipped_ratio",
            *(f"completions/{k}_length" for k in ("mean", "min", "max", "mean_terminated")),
            *(f"sampling/sampling_logp_difference/{k}" for k in ("mean", "max")),
            *(f"sampling/importance_sampling_ratio/{k}" for k in ("min", "mean", "max")), "sampling/masked_fraction",
            *(f"clip_ratio/{k}" for k in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")),
            "staleness/mean",
        }  # fmt: skip
        steps = [entry for entry in run.state.log_history if "loss" in entry]
        # Every other step samples nothing.
        assert [expected - set(entry) for entry in steps[::2]] == [set()] * 2
        assert len(history(run, "eval_reward")) == 1
        assert {"eval_kl", "eval_loss", "eval_entropy", "eval_clip_ratio/low_mean"} <= set(run.state.log_history[-2])

    def test_sampler_and_trainer_agree(self, run):
        assert max(history(run, "sampling/sampling_logp_difference/max")) < 1e-4
        assert max(abs(r - 1) for r in history(run, "sampling/importance_sampling_ratio/max")) < 1e-3

    def test_the_second_update_is_off_policy(self, run):
        assert history(run, "staleness/mean") == [0, 1, 0, 1]
        assert history(run, "kl")[0] == pytest.approx(0, abs=1e-6)
