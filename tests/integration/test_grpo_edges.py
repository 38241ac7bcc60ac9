"""Where GRPO meets the corners of transformers' loop: epochs, restarts, stops, other optimizers, evaluation.

Transformers generates here: what is tested does not depend on the engine, and this one starts at once.
"""

from __future__ import annotations

import math
import threading

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from slipstream import GRPOConfig, GRPOTrainer
from slipstream.commands.outcome import evaluated_last
from slipstream.generation.sleeping import SleepState
from slipstream.generation.transformers import TransformersEngine
from slipstream.modeling.logprobs import PolicyOutput
from slipstream.records import StepTotals
from slipstream.trainers import journal
from slipstream.trainers.metrics import Tally

ROWS = [{"prompt": f"{a}+{b}=", "solution": str(a + b)} for a in range(4) for b in range(4)]


class Digits:
    """The share of digits, and a record of what it was asked to score."""

    __name__ = "digits"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, **_):
        self.calls.append(list(zip(prompts, completions, strict=True)))
        return [sum(c.isdigit() for c in text) / 8 for text in completions]

    @property
    def prompts(self):
        """The prompts of each call, once each, in order."""
        return [list(dict.fromkeys(prompt for prompt, _ in call)) for call in self.calls]


def make(model, folder, *, rows=ROWS, evaluate=None, reward=None, cls=GRPOTrainer, **values):
    peft_config, optimizers = values.pop("peft_config", None), values.pop("optimizers", (None, None))
    settings = {
        "max_completion_length": 8, "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2,
        "logging_steps": 1, "learning_rate": 1e-2, "report_to": [], "gradient_checkpointing": False,
        "save_strategy": "no", "disable_tqdm": True, "html_report": False,
    } | values  # fmt: skip
    return cls(
        model, reward or Digits(), GRPOConfig(output_dir=str(folder), **settings), Dataset.from_list(rows),
        evaluate and Dataset.from_list(evaluate), peft_config=peft_config, optimizers=optimizers,
    )  # fmt: skip


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def load(folder, **config):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config)


class TestEpochs:
    def test_each_epoch_samples_anew_in_a_new_order(self, tiny_model, tmp_path):
        reward = Digits()
        make(tiny_model, tmp_path, rows=ROWS[:8], reward=reward, num_train_epochs=3, max_steps=-1).train()
        assert len(reward.calls) == 12
        epochs = [[p for prompts in reward.prompts[e * 4 : e * 4 + 4] for p in prompts] for e in range(3)]
        assert all(set(epoch) == {row["prompt"] for row in ROWS[:8]} for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]

    def test_a_single_generation_batch_is_sampled_again_each_epoch(self, tiny_model, tmp_path):
        reward = Digits()
        trainer = make(tiny_model, tmp_path, rows=ROWS[:2], reward=reward, max_steps=3)
        trainer.train()
        assert len(reward.calls) == 3
        assert len(history(trainer, "reward")) == 3

    def test_resuming_within_a_later_epoch_continues_it(self, tiny_model, tmp_path):
        whole, cut, resumed = Digits(), Digits(), Digits()
        one = make(tiny_model, tmp_path / "a", rows=ROWS[:8], reward=whole, max_steps=8)
        one.train()
        values = {"rows": ROWS[:8], "max_steps": 8, "save_strategy": "steps", "save_steps": 6}
        make(tiny_model, tmp_path / "b", reward=cut, **values).train()
        two = make(tiny_model, tmp_path / "b", reward=resumed, **values)
        two.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-6"))
        assert resumed.calls == whole.calls[6:]
        assert torch.equal(weights(one), weights(two))

    def test_an_epoch_may_end_within_an_accumulation_window(self, tiny_model, tmp_path):
        """Three slots an epoch, two an optimizer step: the second step has only one."""
        trainer = make(tiny_model, tmp_path, rows=ROWS[:6], max_steps=4, gradient_accumulation_steps=2,
                       steps_per_generation=1)  # fmt: skip
        trainer.train()
        assert trainer.state.epoch == 2
        assert all(math.isfinite(loss) for loss in history(trainer, "loss"))
        assert set(history(trainer, "clip_ratio/region_mean")) == {0.0}

    def test_windows_and_generation_batches_need_not_align(self, tiny_model, tmp_path):
        reward = Digits()
        trainer = make(tiny_model, tmp_path, reward=reward, max_steps=4, gradient_accumulation_steps=3,
                       steps_per_generation=2)  # fmt: skip
        trainer.train()
        # Windows of slots 012, 345, 6 and 7: four generation batches an epoch, then two of the next.
        assert [len(call) for call in reward.calls] == [16] * len(reward.calls)
        assert len(reward.calls) == 6
        assert history(trainer, "staleness/max") == [0, 1, 0, 0]


class TestRestarts:
    def test_training_twice_samples_twice(self, tiny_model, tmp_path):
        reward = Digits()
        trainer = make(tiny_model, tmp_path, reward=reward, max_steps=1)
        trainer.train()
        trainer.train()
        assert len(reward.calls) == 2
        assert reward.prompts[0] == reward.prompts[1]
        assert reward.calls[0] != reward.calls[1], "the weights have changed, and so have the completions"

    def test_a_stop_within_a_window_leaves_nothing_behind(self, tiny_model, tmp_path):
        class Stop(TrainerCallback):
            def on_substep_end(self, args, state, control, **kwargs):
                control.should_training_stop = True

        fresh, trainer = (
            make(tiny_model, tmp_path / name, max_steps=1, gradient_accumulation_steps=2) for name in ("a", "b")
        )
        fresh.train()
        trainer.add_callback(Stop)
        trainer.train()
        assert trainer.state.global_step == 0
        trainer.remove_callback(Stop)
        trainer.train()
        assert torch.equal(weights(fresh), weights(trainer))

    def test_another_dataset_can_be_put_in(self, tiny_model, tmp_path):
        reward = Digits()
        trainer = make(tiny_model, tmp_path, rows=ROWS, reward=reward, max_steps=2)
        trainer.train_dataset = Dataset.from_list(ROWS[:2])
        trainer.train()
        assert all(set(prompts) == {"0+0=", "0+1="} for prompts in reward.prompts)

    def test_measures_of_a_run_before_are_not_mixed_in(self, tiny_model, tmp_path):
        trainer = make(tiny_model, tmp_path, max_steps=1, logging_steps=5)
        trainer.train()
        trainer.train()
        assert len(trainer.metrics.values["step_time"]) == 1


class TestLoop:
    @pytest.mark.parametrize("kind", ["all", "non_padding"])
    def test_transformers_own_token_count_is_ours(self, tiny_model, tmp_path, kind):
        trainer = make(tiny_model, tmp_path, include_num_input_tokens_seen=kind)
        trainer.train()
        assert history(trainer, "num_input_tokens_seen")[:2] == history(trainer, "num_tokens")

    def test_a_steps_parts_are_no_more_than_the_step(self, tiny_model, tmp_path):
        trainer = make(tiny_model, tmp_path, num_iterations=4, max_steps=4, logging_steps=4)
        trainer.train()
        [entry] = [entry for entry in trainer.state.log_history if "step_time" in entry]
        parts = {phase: entry[f"time/{phase}"] for phase in ("generate", "score", "train", "sync")}
        assert all(parts.values()), parts
        assert sum(parts.values()) <= entry["step_time"], parts

    def test_staleness_is_that_of_the_step_that_learns(self, tiny_model, tmp_path):
        trainer = make(tiny_model, tmp_path, max_steps=4, num_iterations=2)
        trainer.train()
        assert history(trainer, "staleness/mean") == [0, 1, 0, 1]

    def test_an_optimizer_with_modes_is_put_into_them(self, tiny_model, tmp_path):
        """As schedule-free optimizers have: they hold other weights in training than in evaluation."""
        seen = []

        class Modes(torch.optim.SGD):
            mode = "eval"

            def train(self):
                self.mode = "train"

            def eval(self):
                self.mode = "eval"

            def step(self, closure=None):
                seen.append(("step", self.mode))

        def reward(completions, **_):
            seen.append(("score", optimizer.mode))
            return [0.0] * len(completions)

        model = load(tiny_model)
        optimizer = Modes(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        trainer = make(model, tmp_path, reward=reward, optimizers=(optimizer, scheduler), max_steps=2,
                       evaluate=ROWS[:2], eval_strategy="steps", eval_steps=1)  # fmt: skip
        trainer.train()
        assert [mode for what, mode in seen if what == "step"] == ["train", "train"]
        assert [mode for what, mode in seen if what == "score"][1::2] == ["eval", "eval"]

    def test_the_cache_is_emptied_as_often_as_asked_for(self, tiny_model, tmp_path, monkeypatch):
        emptied = []
        trainer = make(tiny_model, tmp_path, max_steps=4, torch_empty_cache_steps=2)
        monkeypatch.setattr(
            "slipstream.trainers.base.clear_device_cache", lambda: emptied.append(trainer.state.global_step)
        )
        trainer.train()
        assert emptied == [0, 2]

    def test_deepspeed_must_not_divide_the_loss_again(self, tiny_model, tmp_path, monkeypatch):
        """It would, by gradient_accumulation_steps; and it brings its own way to hold gradients back."""
        from accelerate.utils import DistributedType

        trainer = make(tiny_model, tmp_path, max_steps=1)
        rollouts = trainer._sample_batch(next(iter(trainer._sampler))[0])
        given = []
        monkeypatch.setattr(trainer.accelerator.state, "distributed_type", DistributedType.DEEPSPEED)
        monkeypatch.setattr(trainer.accelerator, "backward", lambda loss, **options: given.append(options))
        monkeypatch.setattr(trainer.accelerator, "no_sync", None)
        trainer.packer.rows = 4
        trainer._learn(trainer.model, rollouts)
        assert given == [{"scale_wrt_gas": False}] * 2


class TestGradientCheckpointing:
    def test_it_changes_nothing(self, tiny_model, tmp_path):
        plain, saving = (
            make(tiny_model, tmp_path / str(on), gradient_checkpointing=on, beta=0.1, num_iterations=2)
            for on in (False, True)
        )
        plain.train()
        saving.train()
        assert (weights(plain) - weights(saving)).abs().max() < 1e-6

    def test_an_adapter_learns_with_it(self, tiny_model, tmp_path):
        from peft import LoraConfig

        adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = make(tiny_model, tmp_path, gradient_checkpointing=True, peft_config=adapter, beta=0.1)
        before = weights(trainer)
        trainer.train()
        assert not torch.equal(before, weights(trainer))
        assert all(norm > 0 for norm in history(trainer, "grad_norm"))


class TestDropout:
    def test_switching_it_off_includes_attention(self, tiny_model, tmp_path):
        model = load(tiny_model, attention_dropout=0.5)
        trainer = make(model, tmp_path, disable_dropout=True, max_steps=1)
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        model.train()
        with torch.no_grad():
            assert torch.equal(model(ids).logits, model(ids).logits)
        trainer.close()

    def test_the_old_policy_is_scored_without_it(self, tiny_model, tmp_path):
        """The engine samples without dropout, so this is the policy that the tokens came from."""
        trainer = make(load(tiny_model, attention_dropout=0.5), tmp_path, steps_per_generation=2)
        trainer.model.train()
        rollouts = trainer._sample_batch(next(iter(trainer._sampler))[0])
        first = [r.extra["old_logps"] for r in rollouts]
        trainer._annotate(trainer.model, rollouts, "old_logps")
        assert all(torch.equal(a, r.extra["old_logps"]) for a, r in zip(first, rollouts, strict=True))
        assert all(module.training for module in trainer.model.modules())


class TestReference:
    def test_an_adapter_that_was_trained_before_is_its_own_reference(self, tiny_model, tmp_path):
        """The reference is the policy at the start of training, not the base model below its adapter."""
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(load(tiny_model), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.2)
        trainer = make(model, tmp_path, beta=0.1)
        trainer.train()
        kl = history(trainer, "kl")
        assert kl[0] == pytest.approx(0, abs=1e-6)
        assert kl[1] > 1e-6


class TestEvaluation:
    def test_predicting_samples_and_scores(self, tiny_model, tmp_path):
        trainer = make(tiny_model, tmp_path)
        output = trainer.predict(Dataset.from_list(ROWS[:3]))
        assert 0 <= output.metrics["test_reward"] <= 1
        assert output.metrics["test_samples_per_second"] > 0

    def test_no_more_rows_are_sampled_at_a_time_than_in_training(self, tiny_model, tmp_path, monkeypatch):
        trainer = make(tiny_model, tmp_path, evaluate=ROWS[:5])
        sample, sizes = trainer.engine._sample, []
        monkeypatch.setattr(
            trainer.engine, "_sample", lambda model, rows, *more: sizes.append(len(rows)) or sample(model, rows, *more)
        )
        trainer.evaluate()
        assert sizes == [8, 8, 4]

    def test_a_policy_that_was_not_trained_computes_as_its_reference_does(self, tiny_model, tmp_path):
        trainer = make(
            tiny_model, tmp_path, evaluate=ROWS[:4], beta=0.1, bf16=True, use_cpu=True, learning_rate=0.0, max_steps=1
        )
        assert trainer.evaluate()["eval_kl"] == 0.0
        trainer.train()
        assert trainer.evaluate()["eval_kl"] == 0.0

    def test_several_datasets_are_evaluated_each(self, tiny_model, tmp_path):
        args = GRPOConfig(str(tmp_path), report_to=[], disable_tqdm=True, max_completion_length=8, html_report=False)
        datasets = {"low": Dataset.from_list(ROWS[:3]), "high": Dataset.from_list(ROWS[-2:])}
        trainer = GRPOTrainer(str(tiny_model), Digits(), args, Dataset.from_list(ROWS), datasets)
        metrics = trainer.evaluate()
        assert {"eval_low_reward", "eval_low_loss", "eval_high_reward", "eval_high_loss"} <= set(metrics)

    def test_the_best_model_is_the_one_at_the_end(self, tiny_model, tmp_path):
        trainer = make(
            tiny_model, tmp_path, evaluate=ROWS[:4], max_steps=3, learning_rate=0.0, eval_strategy="steps",
            eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
            metric_for_best_model="reward", eval_temperature=0.0,
        )  # fmt: skip
        trainer.train()
        best = max(e["eval_reward"] for e in trainer.state.log_history if "eval_reward" in e)
        assert trainer.evaluate()["eval_reward"] == pytest.approx(best)

    def test_weights_of_an_earlier_step_are_evaluated_for_what_the_command_says(self, tiny_model, tmp_path):
        def falling(completions, trainer_state, **_):
            return [[0.5, 1.0, 0.25][trainer_state.global_step]] * len(completions)

        trainer = make(
            tiny_model, tmp_path, evaluate=ROWS[:4], reward=falling, eval_strategy="steps", eval_steps=1,
            save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="reward",
        )  # fmt: skip
        trainer.train()
        assert (trainer.state.best_global_step, evaluated_last(trainer)) == (1, False)
        trainer.args.load_best_model_at_end = False
        assert evaluated_last(trainer)

    def test_rows_outside_the_loss_do_not_touch_the_measures(self, tiny_model, tmp_path):
        """Ranks with a row less than others fill up with one that does not count."""
        args = {"vllm_importance_sampling_mode": "sequence_mask", "max_steps": 1}
        for mode in ("sequence_mask", "token_mask"):
            trainer = make(tiny_model, tmp_path, **args | {"vllm_importance_sampling_mode": mode})
            rollouts = trainer._sample_batch(next(iter(trainer._sampler))[0])
            for i, rollout in enumerate(rollouts):
                rollout.in_loss = i < 4
                rollout.extra["sampler_logps"] = torch.zeros(len(rollout.completion.ids))
            batch = trainer.packer.micro_batch(rollouts, StepTotals(8, 1.0, 1))
            logps = torch.full_like(batch.mask_N, 0.01)
            tally = Tally()
            trainer.objective(PolicyOutput(logps, None), batch, tally)
            values = tally.reduce(trainer.accelerator)
            assert values["sampling/importance_sampling_ratio/min"] > 1
            lengths = [len(r.completion.ids) for r in rollouts[:4]]
            expected = sum(math.exp(0.01 * n) for n in lengths) / 4 if mode == "sequence_mask" else math.exp(0.01)
            assert values["sampling/importance_sampling_ratio/mean"] == pytest.approx(expected, rel=1e-5)


class Sleeper(TransformersEngine):
    """Generates with transformers, and takes sleep and wake as an engine that can sleep does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.state = SleepState(enabled=True)

    def sleep(self, level=1):
        self.state.check_sleep(level)
        self.state.fell_asleep(level)

    def wake(self, tags=None):
        self.state.woke(self.state.check_wake(tags))

    def generate(self, requests, sampling, on_finished=None):
        self.state.check_generate()
        return super().generate(requests, sampling, on_finished)

    def update_weights(self, version, tensors):
        self.state.check_update()
        return super().update_weights(version, tensors)


class TestSleep:
    @pytest.fixture
    def trainer(self, tiny_model, tmp_path, monkeypatch):
        monkeypatch.setattr(GRPOTrainer, "_sleeps", True)
        monkeypatch.setattr("slipstream.generation.transformers.TransformersEngine", Sleeper)
        return make(tiny_model, tmp_path)

    def test_the_engine_sleeps_while_the_trainer_works(self, trainer):
        trainer.train()
        assert str(trainer.engine.state) == "asleep (level 2)"

    @pytest.mark.parametrize("verb", ["generate", "update_weights"])
    def test_a_failure_does_not_leave_it_awake(self, trainer, monkeypatch, verb):
        def fail(*args):
            raise ValueError("a prompt is too long")

        with monkeypatch.context() as broken:
            broken.setattr(trainer.engine, verb, fail)
            with pytest.raises(ValueError, match="too long"):
                trainer.train()
        assert str(trainer.engine.state) == "asleep (level 2)"
        trainer.train()
        assert trainer.state.global_step == 2


def test_completions_are_uploaded_where_that_was_asked_for(tiny_model, tmp_path, monkeypatch):
    """The Hub is not ours to test: what is sent to it is."""
    import huggingface_hub

    sent = []

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repository, **options):
            sent.append(("create", repository, options["repo_type"], options["exist_ok"]))

        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, repo_type):
            sent.append(("upload", repo_id, path_in_repo, path_or_fileobj.count(b"\n")))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    make(tiny_model, tmp_path, log_completions=True, log_completions_hub_repo="me/data").train()
    assert sent == [("create", "me/data", "dataset", True), ("upload", "me/data", "completions.jsonl", 16)]


@pytest.mark.parametrize("way", ["refuses", "is silent"])
def test_a_hub_that_fails_costs_no_run(tiny_model, tmp_path, monkeypatch, caplog, way):
    import huggingface_hub

    over = threading.Event()

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repository, **options):
            if way == "is silent":
                over.wait(60)
            raise ConnectionError("no Hub here")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(journal, "UPLOAD_SECONDS", 60 if way == "refuses" else 0.1)
    trainer = make(tiny_model, tmp_path, log_completions=True, log_completions_hub_repo="me/data",
                   save_strategy="steps", save_steps=1)  # fmt: skip
    trainer.train()
    over.set()
    assert trainer.state.global_step == 2
    said = "(no Hub here): the run goes on" if way == "refuses" else "has not taken completions.jsonl within 0.1 s"
    assert said in caplog.text
