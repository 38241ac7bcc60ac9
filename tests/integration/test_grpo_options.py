"""GRPO's options in a whole run: each trains, and none depends on how rows are cut into micro-batches.

transformers generates here: it starts at once, and the options do not care who samples.
"""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset

from slipstream import GRPOConfig, GRPOTrainer
from slipstream.trainers.metrics import Tally

ROWS = [{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)]
OPTIONS = [
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "bnpo", "scale_rewards": "batch"},
    {"loss_type": "dr_grpo", "scale_rewards": "none"},
    {"loss_type": "luspo"},
    {"loss_type": "cispo", "epsilon_high": 2.0},
    {"loss_type": "sapo"},
    {"loss_type": "vespo"},
    {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5]},
    {"mask_truncated_completions": True},
    {"top_entropy_quantile": 0.3, "entropy_coef": 0.1},
    {"off_policy_mask_threshold": 0.0, "delta": 1.5},
    {"cast_lm_head_to_fp32": True},
]


def digits(completions, **_):
    return [sum(c.isdigit() for c in text) / 6 for text in completions]


def short(completions, **_):
    return [-len(text) / 6 for text in completions]


def train(model, folder, **values):
    settings = {
        "max_completion_length": 6, "per_device_train_batch_size": 16, "num_generations": 4, "max_steps": 1,
        "logging_steps": 1, "learning_rate": 1.0, "optim": "sgd", "report_to": [], "gradient_checkpointing": False,
        "save_strategy": "no", "disable_tqdm": True, "html_report": False,
    } | values  # fmt: skip
    args = GRPOConfig(output_dir=str(folder), **settings)
    trainer = GRPOTrainer(model, [digits, short], args, Dataset.from_list(ROWS))
    trainer.train(resume_from_checkpoint=values.get("resume_from_checkpoint"))
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o)))
def test_an_option_trains_alike_however_rows_are_cut(tiny_model, tmp_path, options):
    whole = train(tiny_model, tmp_path, **options)
    cut = train(tiny_model, tmp_path, **options | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4})
    untouched = torch.cat([p.flatten() for p in type(whole.model).from_pretrained(tiny_model).parameters()])
    assert (weights(whole) - weights(cut)).abs().max() < 2e-6
    assert (weights(whole) - untouched).abs().max() > 1e-5
    assert weights(whole).isfinite().all()


def test_the_entropy_mask_keeps_the_asked_share(tiny_model, tmp_path):
    trainer = GRPOTrainer(
        tiny_model, digits, GRPOConfig(
            str(tmp_path), top_entropy_quantile=0.3, max_completion_length=6, report_to=[], disable_tqdm=True
        ),
        Dataset.from_list(ROWS),
    )  # fmt: skip
    rollouts = trainer._generate(trainer.train_dataset, [(i, 0, 4) for i in range(8)], ("seed",), evaluation=False)
    trainer.prepare(trainer.model, rollouts)
    kept = torch.cat([r.extra["entropy_mask"] for r in rollouts])
    assert kept.mean().item() == pytest.approx(0.3, abs=1 / len(kept))
    assert trainer._totals(rollouts).chosen_tokens == kept.sum()


def test_the_entropy_that_a_share_of_tokens_reach(tiny_model, tmp_path):
    trainer = train(tiny_model, tmp_path, top_entropy_quantile=0.25)
    threshold = trainer._entropy_threshold
    values = torch.linspace(1, 9, 9)
    assert threshold([values[5:], values[:5]]).item() == torch.quantile(values, 0.75).item() == 7.0
    # Rounding puts tokens that are sure a little below 0: they are tokens.
    sure = torch.tensor([-1e-6] * 6 + [1.0, 2.0])
    assert threshold([sure]).item() == pytest.approx(torch.quantile(sure, 0.75).item(), rel=1e-6)
    assert threshold([torch.zeros(2**24 + 1)]).item() == 0
    assert threshold([]).item() == -math.inf


def test_a_step_without_a_token_to_choose_from_learns_nothing(tiny_model, tmp_path):
    trainer = train(tiny_model, tmp_path, top_entropy_quantile=0.5, mask_truncated_completions=True,
                    max_completion_length=1, max_steps=2)  # fmt: skip
    assert trainer.state.global_step == 2


def test_a_rollout_may_be_learnt_from_twice_in_a_step(tiny_model, tmp_path):
    trainer = train(tiny_model, tmp_path, top_entropy_quantile=0.5, num_iterations=2, gradient_accumulation_steps=2,
                    steps_per_generation=1)  # fmt: skip
    assert trainer.state.global_step == trainer.args.max_steps


@pytest.mark.parametrize("loss_type", ["grpo", "luspo", "dr_grpo", "dapo"])
def test_rows_that_fill_up_ranks_do_not_count_in_an_evaluations_loss(tiny_model, tmp_path, loss_type):
    trainer = train(tiny_model, tmp_path, beta=0.1, loss_type=loss_type)
    wanted = [(row, 0, 4) for row in (0, 1, 0)]
    rollouts, _ = trainer._collect(trainer.train_dataset, wanted, ("eval",), 4, 8)
    assert [r.in_loss for r in rollouts] == [True] * 8 + [False] * 4
    alone = trainer._loss(rollouts[:8], 8, 4, Tally()).item()
    assert alone != 0
    assert trainer._loss(rollouts, 8, 4, Tally()).item() == pytest.approx(alone, rel=1e-5)


def test_the_reference_moves_towards_the_policy(tiny_model, tmp_path):
    trainer = train(tiny_model, tmp_path, beta=0.1, sync_ref_model=True, ref_model_sync_steps=2, max_steps=3,
                    ref_model_mixup_alpha=0.5)  # fmt: skip
    start = torch.cat([p.flatten() for p in type(trainer.model).from_pretrained(tiny_model).parameters()])
    reference = torch.cat([p.detach().flatten() for p in trainer.reference.parameters()])
    moved, policy = (reference - start).norm(), (weights(trainer) - start).norm()
    assert 0 < moved < policy
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-7)
    assert kl[1] > 1e-7


@pytest.mark.parametrize("bias", ["none", "all"])
def test_an_adapter_has_no_reference_that_could_move(tiny_model, tmp_path, bias):
    from peft import LoraConfig

    args = GRPOConfig(str(tmp_path), beta=0.1, sync_ref_model=True, max_completion_length=6, report_to=[])
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", bias=bias)
    with pytest.raises(ValueError, match="sync_ref_model=True does not go with an adapter"):
        GRPOTrainer(tiny_model, digits, args, Dataset.from_list(ROWS), peft_config=adapter)


def test_what_moves_is_in_the_checkpoint(tiny_model, tmp_path):
    options = {
        "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "use_adaptive_entropy": True,
        "entropy_target": 10.0, "max_steps": 6, "learning_rate": 0.1,
    }  # fmt: skip
    whole = train(tiny_model, tmp_path / "whole", **options)
    train(tiny_model, tmp_path / "cut", **options, save_strategy="steps", save_steps=3)
    resumed = train(tiny_model, tmp_path / "cut", **options,
                    resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))  # fmt: skip
    assert torch.equal(weights(whole), weights(resumed))
    for name in ("kl", "entropy_coef", "loss"):
        histories = [[e[name] for e in t.state.log_history if name in e] for t in (whole, resumed)]
        assert histories[0] == histories[1], name
    assert resumed.entropy_coef == pytest.approx(6 * 0.005)
