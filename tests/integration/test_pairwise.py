"""RLOO, Online DPO, Nash-MD and XPO in whole runs on a tiny model; transformers generates, which starts at once."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from engines import greedy, logprobs
from rounds import ALL, PAIRWISE, ROWS, Gradients, adapter, away, digits, gradient, history, load, make, sample, weights

from slipstream import GRPOConfig
from slipstream.judges import BasePairwiseJudge, RewardFunctionJudge
from slipstream.records import StepTotals

METRICS = {
    "RLOO": {"kl", "entropy", "clip_ratio/region_mean"},
    "OnlineDPO": {
        *(f"objective/{k}" for k in ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores", "scores_margin")),
        *(f"rewards/{k}" for k in ("chosen", "rejected", "accuracies", "margins")), "logps/chosen", "logps/rejected",
        "val/contain_eos_token", "beta", "judgements/failed",
    },
    "NashMD": {
        "loss/kl", "loss/score",
        *(f"rewards/{k}" for k in ("probabilities", "accuracies", "margins", "chosen", "rejected")),
        "logps/chosen", "logps/rejected", "val/model_contain_eos_token", "val/ref_contain_eos_token", "beta",
        "mixture_coef", "objective/kl", "objective/entropy", "judgements/failed",
    },
    "XPO": {
        "loss/dpo", "loss/xpo",
        *(f"objective/{k}" for k in ("kl", "entropy", "model_scores", "ref_scores", "scores_margin")),
        *(f"rewards/{k}" for k in ("chosen", "rejected", "accuracies", "margins")), "logps/chosen", "logps/rejected",
        "val/model_contain_eos_token", "val/ref_contain_eos_token", "alpha", "beta", "judgements/failed",
        "judgements/won",
    },
}  # fmt: skip
EVERYWHERE = {
    "loss", "reward", "reward_std", "rewards/digits/mean", "rewards/digits/std", "completions/mean_length",
    "completions/clipped_ratio",
}  # fmt: skip


class Sometimes(BasePairwiseJudge):
    """Prefers more digits, and fails at every third pair."""

    def judge(self, prompts, completions, shuffle_order=True):
        scores = [digits(pair) for pair in completions]
        return [-1 if i % 3 == 2 else int(b > a) for i, (a, b) in enumerate(scores)]


class First(BasePairwiseJudge):
    """Prefers whatever is shown first."""

    def judge(self, prompts, completions, shuffle_order=True):
        return [0] * len(prompts)


@pytest.mark.parametrize("name", ALL)
class TestEach:
    def test_it_trains_evaluates_and_logs(self, tiny_model, tmp_path, name):
        trainer = make(name, tiny_model, tmp_path, evaluate=ROWS[:3], eval_strategy="steps", eval_steps=2)
        trainer.train()
        steps = [e for e in trainer.state.log_history if "loss" in e]
        [evaluation] = [e for e in trainer.state.log_history if "eval_loss" in e]
        expected = METRICS[name] | EVERYWHERE
        assert [expected - set(e) for e in steps] == [set(), set()]
        assert {f"eval_{m}" for m in expected} - set(evaluation) == set()
        assert all(math.isfinite(e["grad_norm"]) and e["grad_norm"] > 0 for e in steps)
        assert not torch.equal(weights(trainer.model), weights(load(tiny_model)))

    def test_the_split_into_micro_batches_changes_nothing(self, tiny_model, tmp_path, name):
        seen = []
        for parts in (1, 4):
            trainer = make(
                name, away(tiny_model), tmp_path, max_steps=1, max_grad_norm=0.0, gradient_accumulation_steps=parts,
                per_device_train_batch_size=(32 if name == "RLOO" else 8) // parts,
            )  # fmt: skip
            trainer.reference = load(tiny_model)
            gradients = Gradients()
            trainer.add_callback(gradients)
            trainer.train()
            seen += gradients.seen
        whole, split = seen
        assert (whole - split).norm() / whole.norm() <= 1e-6

    def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(self, tiny_model, tmp_path, name):
        values = {"max_steps": 6, "steps_per_generation": 2, "save_strategy": "steps", "save_steps": 3,
                  "logging_steps": 2}  # fmt: skip
        whole = make(name, tiny_model, tmp_path, **values)
        whole.train()
        resumed = make(name, tiny_model, tmp_path, **values)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

        def logged(trainer):
            timed = ("time", "_per_second", "sync/seconds")
            return [{k: v for k, v in e.items() if not any(t in k for t in timed)} for e in trainer.state.log_history]

        assert torch.equal(weights(whole.model), weights(resumed.model))
        assert logged(whole) == logged(resumed)

    def test_the_reference_of_an_adapter_is_the_model_without_it(self, tiny_model, tmp_path, name):
        trainer = make(name, tiny_model, tmp_path, arguments={"peft_config": adapter()}, temperature=1.0)
        rollouts = [r for r in sample(trainer) if "ref_logps" in r.extra]
        base = load(tiny_model)
        for rollout in rollouts:
            expected = logprobs(base, rollout.prompt.ids, rollout.completion.ids)
            assert (rollout.extra["ref_logps"] - expected).abs().max() < 1e-4
        trainer._annotate(trainer.model, rollouts, "own")
        assert max((r.extra["own"] - r.extra["ref_logps"]).abs().max() for r in rollouts) > 0.1

    @pytest.mark.parametrize(
        "options", [{"bias": "all"}, {"init_lora_weights": "pissa"}], ids=["trained biases", "weights moved into it"]
    )
    @pytest.mark.parametrize("given", ["name", "model"])
    def test_the_reference_of_an_adapter_that_changes_the_model_below_it(
        self, tiny_model, tmp_path, name, options, given
    ):
        """Without such an adapter the model is not what it was before."""
        model = tiny_model if given == "name" else load(tiny_model)
        config = adapter(**{"init_lora_weights": True} | options)
        trainer = make(name, model, tmp_path, arguments={"peft_config": config}, temperature=1.0)
        trainer.train()
        base = load(tiny_model)
        for rollout in sample(trainer)[::2]:
            expected = logprobs(base, rollout.prompt.ids, rollout.completion.ids)
            assert (rollout.extra["ref_logps"] - expected).abs().max() < 2e-4

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"quantization_config": "4 bits"}, ValueError, "quantization_config is for loading .* model is a Qwen2"),
            ({"processing_class": "some/tokenizer"}, TypeError, "processing_class='some/tokenizer' is neither"),
            ({"args": GRPOConfig("out", report_to=[])}, TypeError, r"args is a slipstream\..*GRPOConfig: .* takes a"),
        ],
    )
    def test_what_would_be_overlooked_is_an_error(self, tiny_model, tmp_path, name, arguments, error, message):
        with pytest.raises(error, match=message):
            make(name, load(tiny_model), tmp_path, arguments=arguments)


@pytest.mark.parametrize("name", PAIRWISE)
class TestPairs:
    def test_a_failed_judgement_is_no_vote(self, tiny_model, tmp_path, name):
        arguments = {"reward_funcs": None, "judge": Sometimes(), "ref_model": load(tiny_model)}
        trainer = make(name, away(tiny_model), tmp_path, arguments=arguments, per_device_train_batch_size=6)
        rollouts = sample(trainer)
        assert [r.in_loss for r in rollouts] == [True] * 4 + [False] * 2 + [True] * 4 + [False] * 2
        assert trainer.metrics.values["judgements/failed"] == [pytest.approx(1 / 3)]
        _, everything = gradient(trainer, rollouts)
        _, judged = gradient(trainer, [r for r in rollouts if r.in_loss])
        assert (everything - judged).norm() / judged.norm() <= 1e-6

    def test_a_judge_trains_and_evaluates(self, tiny_model, tmp_path, name):
        arguments = {"reward_funcs": None, "judge": Sometimes()}
        trainer = make(name, tiny_model, tmp_path, arguments=arguments, evaluate=ROWS[:3], eval_strategy="steps",
                       eval_steps=2, html_report=True, log_completions=True)  # fmt: skip
        trainer.train()
        assert history(trainer, "eval_judgements/failed") == [pytest.approx(1 / 3)]
        assert len(history(trainer, "rewards/accuracies")) == 2

    @pytest.mark.parametrize("real", [4, 0])
    def test_rows_that_fill_up_a_rank_are_not_judged(self, tiny_model, tmp_path, name, real):
        """A judge may cost money."""
        asked = []

        class Counts(First):
            def judge(self, prompts, completions, shuffle_order=True):
                asked.extend(prompts)
                return super().judge(prompts, completions)

        trainer = make(name, tiny_model, tmp_path, arguments={"reward_funcs": None, "judge": Counts()})
        wanted = [(row, 0, 2) for row in range(3)]
        rollouts, metrics = trainer._collect(trainer.train_dataset, wanted, ("seed",), 2, real)
        assert asked == [ROWS[row]["prompt"] for row in range(real // 2)]
        assert [r.in_loss for r in rollouts] == [True] * real + [False] * (6 - real)
        assert metrics.get("judgements/failed") == (0.0 if real else None)

    def test_equal_completions_cannot_be_judged(self, tiny_model, tmp_path, name, recwarn):
        judge = {"reward_funcs": None, "judge": First()}
        make(name, tiny_model, tmp_path, eval_temperature=0.0)
        make(name, tiny_model, tmp_path, arguments=judge)
        make(name, tiny_model, tmp_path, eval_temperature=0.0, arguments=judge)
        warned = [str(w.message) for w in recwarn if "eval_temperature" in str(w.message)]
        # Of Nash-MD and XPO the second completion is another player's.
        assert len(warned) == (name == "OnlineDPO")
        assert all("gives a prompt the same completion twice" in message for message in warned)

    def test_a_judge_that_contradicts_itself_has_not_voted(self, tiny_model, tmp_path, name):
        judge = First()
        judge.both_orders = True
        trainer = make(name, tiny_model, tmp_path, arguments={"reward_funcs": None, "judge": judge})
        rollouts = sample(trainer)
        # Nash-MD knows what to do with one half: neither is raised.
        knows = name == "NashMD"
        assert {(r.in_loss, r.advantage) for r in rollouts} == {(knows, 0.0)}
        assert trainer.metrics.values["judgements/failed"] == [0.0 if knows else 1.0]

    def test_why_judgements_failed_is_logged(self, tiny_model, tmp_path, name, caplog):
        class Reasons(Sometimes):
            def take_failures(self):
                return {"no answer": 1}

        trainer = make(name, tiny_model, tmp_path, arguments={"reward_funcs": None, "judge": Reasons()})
        sample(trainer)
        assert "1 judgements failed, and their pairs are left out: no answer (1)" in caplog.text

    def test_a_reward_function_as_judge_reads_the_datasets_columns(self, tiny_model, tmp_path, name):
        def right(prompts, completions, solution, **_):
            assert solution == [str(int(prompt[0]) + int(prompt[2])) for prompt in prompts]
            return [float(len(c)) for c in completions]

        trainer = make(
            name, tiny_model, tmp_path, arguments={"reward_funcs": None, "judge": RewardFunctionJudge(right)}
        )
        for first, second in zip(*[iter(sample(trainer))] * 2, strict=True):
            ahead = len(first.text) - len(second.text)
            assert (first.advantage > 0) == (ahead > 0)
            assert first.in_loss == (name == "NashMD" or ahead != 0)

    def test_no_pair_judged_is_no_gradient(self, tiny_model, tmp_path, name):
        def never(completions, **_):
            return [None] * len(completions)

        trainer = make(name, tiny_model, tmp_path, arguments={"reward_funcs": never})
        trainer.train()
        assert torch.equal(weights(trainer.model), weights(load(tiny_model)))
        assert history(trainer, "judgements/failed") == [1.0, 1.0]

    def test_a_reward_model_scores(self, tiny_model, tmp_path, name):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        scorer = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
        arguments = {"reward_funcs": [scorer, digits],
                     "reward_processing_classes": [AutoTokenizer.from_pretrained(tiny_model), None]}  # fmt: skip
        trainer = make(name, tiny_model, tmp_path, arguments=arguments, reward_weights=[1.0, 0.5])
        trainer.train()
        assert len(history(trainer, "rewards/tiny/mean")) == len(history(trainer, "rewards/digits/mean")) == 2

    def test_older_names_of_a_reward_model(self, tiny_model, tmp_path, name):
        judge = str(tiny.build_reward_model(tmp_path / "judge"))
        with pytest.warns(FutureWarning, match="older names of reward_funcs"):
            trainer = make(name, tiny_model, tmp_path, arguments={"reward_funcs": None, "reward_model": judge})
        assert trainer.rewards.names == ["judge"]
        named = make(name, tiny_model, tmp_path, arguments={"reward_funcs": None}, reward_model_path=judge)
        assert named.rewards.names == ["judge"]

    def test_missing_ends_cost(self, tiny_model, tmp_path, name):
        trainer = make(name, tiny_model, tmp_path, missing_eos_penalty=10.0)
        for rollout in sample(trainer):
            assert rollout.extra["score"] == pytest.approx(rollout.rewards[0] - 10 * rollout.truncated)

    def test_values_change_with_the_epoch(self, tiny_model, tmp_path, name):
        values = {"XPO": {"alpha": [1e-5, 0.1]}, "NashMD": {"mixture_coef": [0.5, 0.0]}}.get(name, {})
        trainer = make(name, tiny_model, tmp_path, rows=ROWS[:4], max_steps=3, beta=[0.1, 0.3], **values)
        trainer.train()
        assert history(trainer, "beta") == [pytest.approx(b) for b in (0.1, 0.3, 0.3)]
        for field, (first, later) in values.items():
            assert history(trainer, field) == [pytest.approx(v) for v in (first, later, later)]

    def test_an_evaluation_has_the_values_of_the_epoch_that_was_trained(self, tiny_model, tmp_path, monkeypatch, name):
        """At an epoch's end transformers counts the next one already."""
        values = {"XPO": {"alpha": [1e-5, 0.1]}, "NashMD": {"mixture_coef": [0.5, 0.25]}}.get(name, {})
        settings = {"rows": ROWS[:4], "evaluate": ROWS[:2], "max_steps": 2, "beta": [0.1, 0.3], **values}
        trainer = make(name, tiny_model, tmp_path, eval_strategy="epoch", save_strategy="epoch", **settings)
        asked = []
        original = trainer.engine.generate
        monkeypatch.setattr(
            trainer.engine, "generate", lambda r, *rest: asked.append((len(r), r[0].mixture)) or original(r, *rest)
        )
        trainer.train()
        for field, expected in ({"beta": [0.1, 0.3]} | values).items():
            assert history(trainer, f"eval_{field}") == pytest.approx(expected), field
        if name == "NashMD":
            # Of both completions of two evaluated prompts.
            assert [mixture for count, mixture in asked if count == 2] == [0.0, 0.5, 0.0, 0.25]

        resumed = make(name, tiny_model, tmp_path, **settings | {"max_steps": 1})
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert resumed.evaluate()["eval_beta"] == pytest.approx(0.1)

    def test_metrics_of_a_group_are_those_of_a_group(self, tiny_model, tmp_path, name):
        trainer = make(name, tiny_model, tmp_path)
        sample(trainer)
        # Of one completion it says nothing.
        assert ("frac_reward_zero_std" in trainer.metrics.values) == (name == "OnlineDPO")

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"reward_funcs": None}, ValueError, "neither is"),
            ({"judge": Sometimes()}, ValueError, "both are"),
            ({"reward_funcs": None, "judge": digits}, TypeError, "BasePairwiseJudge"),
            ({"compute_metrics": len}, ValueError, "compute_metrics=.*leave it None"),
            ({"ref_model": "some/model"}, TypeError, "ref_model='some/model' is not a model"),
            ({"reward_model": "some/model"}, ValueError, "reward_funcs and reward_model are both given"),
            ({"reward_funcs": [digits, 3]}, TypeError, "reward_funcs holds 3"),
            ({"reward_funcs": [digits, digits]}, ValueError, "same name"),
            ({"peft_config": {"r": 4}}, TypeError, "peft_config=.* is not a peft.PeftConfig"),
        ],
    )
    def test_wrong_arguments_are_errors_before_a_model_loads(self, tmp_path, name, arguments, error, message):
        with pytest.raises(error, match=message):
            make(name, "no/such-model-anywhere", tmp_path, arguments=arguments)

    def test_a_judge_gives_no_scores_to_take_a_penalty_from(self, tmp_path, name):
        with pytest.raises(ValueError, match=r"missing_eos_penalty=1\.0 is taken from scores"):
            make(name, "m", tmp_path, missing_eos_penalty=1.0, arguments={"reward_funcs": None, "judge": Sometimes()})

    def test_the_model_is_not_its_own_reference(self, tiny_model, tmp_path, name):
        model = load(tiny_model)
        with pytest.raises(ValueError, match="ref_model is the model itself"):
            make(name, model, tmp_path, arguments={"ref_model": model})

    def test_rows_that_are_too_long_are_skipped(self, tiny_model, tmp_path, name):
        rows = [*ROWS[:4], {"prompt": "1" * 60, "solution": "1"}]
        with pytest.warns(UserWarning, match="more than max_length of 64.* They are skipped"):
            trainer = make(name, tiny_model, tmp_path, rows=rows, max_length=64)
        assert len(trainer.train_dataset) == 4


def scored(trainer):
    """For each pair: summed log-probabilities of both rows under policy (differentiable) and reference, and scores."""
    rollouts = sample(trainer)

    def total(model, r):
        logits = model(torch.tensor([[*r.prompt.ids, *r.completion.ids]])).logits[0, len(r.prompt.ids) - 1 : -1]
        return logits.double().log_softmax(-1).gather(-1, torch.tensor(r.completion.ids)[:, None])

    pairs = []
    for pair in zip(rollouts[::2], rollouts[1::2], strict=True):
        own = [total(trainer.model, r) for r in pair]
        with torch.no_grad():
            reference = [total(trainer.reference, r) for r in pair]
        pairs.append((own, reference, [r.rewards[0] for r in pair]))
    return rollouts, pairs


def assert_gradient(trainer, rollouts, loss):
    trainer.model.zero_grad()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    got_loss, got = gradient(trainer, rollouts)
    assert got_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert (got - expected).norm() / expected.norm() < 2e-5


@pytest.mark.parametrize("name", ["OnlineDPO", "XPO"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_the_loss_is_the_formula(tiny_model, tmp_path, name, loss_type):
    values = {"alpha": 0.01} if name == "XPO" else {}
    trainer = make(name, away(tiny_model), tmp_path, arguments={"ref_model": load(tiny_model)}, loss_type=loss_type,
                   beta=0.2, **values)  # fmt: skip
    rollouts, pairs = scored(trainer)
    losses = []
    for own, reference, scores in pairs:
        c = 0 if scores[0] >= scores[1] else 1
        h = (own[c].sum() - own[1 - c].sum()) - (reference[c].sum() - reference[1 - c].sum())
        loss = -torch.nn.functional.logsigmoid(0.2 * h) if loss_type == "sigmoid" else (h - 1 / 0.4) ** 2
        losses.append(loss + (0.01 * own[1].sum() if name == "XPO" else 0))
    assert_gradient(trainer, rollouts, sum(losses) / len(losses))


def test_nash_md_is_the_formula(tiny_model, tmp_path):
    trainer = make("NashMD", away(tiny_model), tmp_path, arguments={"ref_model": load(tiny_model)}, beta=0.2)
    rollouts, pairs = scored(trainer)
    losses = []
    for own, reference, scores in pairs:
        p = 1 / (1 + math.exp(scores[1] - scores[0]))
        y, ref = own[0], reference[0]
        losses.append(0.2 * ((y - ref).detach() * y).sum() - (p - 0.5) * y.sum())
    assert_gradient(trainer, rollouts, sum(losses) / len(losses))
    assert "ref_logps" not in rollouts[1].extra, "the opponent's completion goes through no model"


def test_parts_of_nash_mds_loss_are_logged_as_what_they_stand_for(tiny_model, tmp_path):
    """The divergence from the reference, and how much what wins is raised: the loss's own values mean neither."""
    trainer = make("NashMD", away(tiny_model), tmp_path, arguments={"ref_model": load(tiny_model)})
    rollouts, pairs = scored(trainer)
    _, metrics = trainer._learn(trainer.model, rollouts)
    divergences = [(own[0] - reference[0]).sum().item() for own, reference, _ in pairs]
    raised = [(1 / (1 + math.exp(s[1] - s[0])) - 0.5) * own[0].sum().item() for own, _, s in pairs]
    assert metrics["loss/kl"] == pytest.approx(sum(divergences) / len(pairs), rel=1e-4)
    assert metrics["loss/score"] == pytest.approx(sum(raised) / len(pairs), rel=1e-4)


def test_both_completions_of_online_dpo_are_one_request(tiny_model, tmp_path, monkeypatch):
    trainer = make("OnlineDPO", tiny_model, tmp_path)
    asked = []
    original = trainer.engine.generate
    monkeypatch.setattr(trainer.engine, "generate", lambda r, s, f: asked.append((list(r), s)) or original(r, s, f))
    sample(trainer)
    [(requests, sampling)] = asked
    assert {(r.n, r.mixture) for r in requests} == {(2, 0.0)}
    assert len(requests) == 4
    assert sampling.logprobs is False


@pytest.mark.parametrize(("name", "mixture"), [("XPO", 1.0), ("NashMD", 0.3)])
def test_the_second_completion_has_the_reference_in_it(tiny_model, tmp_path, monkeypatch, name, mixture):
    values = {} if name == "XPO" else {"mixture_coef": mixture}
    trainer = make(name, tiny_model, tmp_path, **values)
    asked = []
    original = trainer.engine.generate
    monkeypatch.setattr(trainer.engine, "generate", lambda r, s: asked.append(list(r)) or original(r, s))
    rollouts = sample(trainer)
    own, others = asked
    assert {(r.n, r.mixture) for r in own} == {(1, 0.0)}
    assert {(r.n, r.mixture) for r in others} == {(1, mixture)}
    assert [b.seed - a.seed for a, b in zip(own, others, strict=True)] == [1] * 4
    assert all(a.prompt is b.prompt for a, b in zip(rollouts[::2], rollouts[1::2], strict=True))


def test_xpo_with_an_adapter_samples_from_the_model_without_it(tiny_model, tmp_path):
    """Fails where the reference is `get_base_model()`, whose layers still have the adapter in them."""
    trainer = make("XPO", tiny_model, tmp_path, arguments={"peft_config": adapter()}, eval_temperature=0.0)
    rollouts, _ = trainer._collect(trainer.train_dataset, [(i, 0, 2) for i in range(4)], ("seed",), 2, 8)
    base, end = load(tiny_model), trainer.eos_ids
    with torch.no_grad():
        for own, other in zip(rollouts[::2], rollouts[1::2], strict=True):
            assert other.completion.ids == greedy(base, other.prompt.ids, 8, end)
            assert own.completion.ids == greedy(trainer.model, own.prompt.ids, 8, end)
    assert any(a.completion.ids != b.completion.ids for a, b in zip(rollouts[::2], rollouts[1::2], strict=True))


def test_pairs_stay_together(tiny_model, tmp_path):
    trainer = make("OnlineDPO", tiny_model, tmp_path, per_device_train_batch_size=8)
    rollouts = sample(trainer)
    trainer.packer.rows = 4
    batches = list(trainer.packer.pack(rollouts, StepTotals(16, 1.0, 1), 2))
    assert [len(b.rollouts) for b in batches] == [4] * 4
    for batch in batches:
        assert all(a.prompt is b.prompt for a, b in zip(batch.rollouts[::2], batch.rollouts[1::2], strict=True))
