"""A run that is killed and resumed must not differ from one that was left alone: same weights, same log, to the bit."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import resumable
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from slipstream.trainers.grpo import GRPOTrainer

VLLM = {"use_vllm": True}
# Generation batches of 8 steps: the checkpoint of step 5 is in the middle of one, and between two logs.
REPLAYED = {
    "steps_per_generation": 4, "gradient_accumulation_steps": 1, "num_iterations": 2, "beta": 0.1, "logging_steps": 2,
    "per_device_train_batch_size": 8,
}  # fmt: skip
# Four steps an epoch, two a generation batch: the checkpoint of step 5 is in the middle of one, and between two logs,
# in an epoch with values that neither the one before nor the one after it has.
PAIRS = VLLM | {
    "steps_per_generation": 2, "gradient_accumulation_steps": 1, "logging_steps": 2, "per_device_train_batch_size": 4,
    "rows": 16, "beta": [0.1, 0.3, 0.05],
}  # fmt: skip
OTHERS = {
    # Its KL is a part of the reward, so that the rest of the batch needs log-probabilities of an older policy.
    "RLOO": VLLM | REPLAYED | {"steps_per_generation": 2, "beta": 0.05},
    "OnlineDPO": PAIRS,
    "NashMD": PAIRS | {"mixture_coef": [0.5, 0.25, 0.75]},
    "XPO": PAIRS | {"alpha": [0.01, 0.03, 0.02]},
}


class Snapshot(TrainerCallback):
    """Copies what a run has written once its first checkpoint is there: what it would leave if it stopped there."""

    def __init__(self, target):
        self.target = target

    def on_save(self, args, state, control, **kwargs):
        if not self.target.exists():
            shutil.copytree(args.output_dir, self.target)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def logged(history):
    """The log without what a clock measured."""

    def measured(name):
        return "time" in name or name.endswith("_per_second") or name in ("sync/seconds", "memory/peak_gb")

    return [{name: value for name, value in entry.items() if not measured(name)} for entry in history]


def start_to_be_killed(model, folder, settings):
    command = [sys.executable, resumable.__file__, str(model), str(folder), json.dumps(settings), "kill"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def trained(model, folder, resume=None, **settings):
    trainer = resumable.make(model, folder, **settings)
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        trainer.close()
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(VLLM, id="plain"),
        pytest.param(VLLM | REPLAYED, id="within a generation batch", marks=pytest.mark.slow),
        # Two steps an epoch.
        pytest.param(
            VLLM | {"rows": 8, "eval_strategy": "steps", "eval_steps": 5},
            id="in a later epoch",
            marks=pytest.mark.slow,
        ),
        # Five steps an epoch: the checkpoint is at its end. Dropout draws from the random state.
        pytest.param(
            {"rows": 20, "adapter": True, "beta": 0.1, "eval_on_start": True},
            id="transformers generates",
            marks=pytest.mark.slow,
        ),
        # An engine that starts anew has neither the policy nor the reference of the one that was killed.
        pytest.param({"trainer": "NashMD"} | OTHERS["NashMD"], id="a reference that vLLM samples from"),
    ],
)
def test_a_killed_run_continues_as_if_nothing_had_been(tiny_model, tmp_path, settings):
    killed = start_to_be_killed(tiny_model, tmp_path / "cut", settings)
    whole = trained(str(tiny_model), tmp_path / "whole", **settings)
    output, _ = killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL, output[-4000:]
    checkpoint = tmp_path / "cut" / "checkpoint-5"
    assert checkpoint.is_dir()
    assert not (tmp_path / "cut" / "checkpoint-10").exists()

    resumed = trained(str(tiny_model), tmp_path / "cut", resume=True, **settings)

    assert resumed.state.global_step == 10
    assert torch.equal(weights(whole), weights(resumed))
    assert logged(whole.state.log_history) == logged(resumed.state.log_history)
    journals = [(tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "cut")]
    assert journals[0] == journals[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_trainers_continue_as_if_nothing_had_been(tiny_model, tmp_path, name):
    settings = OTHERS[name] | {"trainer": name}
    whole = trained(str(tiny_model), tmp_path / "whole", callbacks=[Snapshot(tmp_path / "cut")], **settings)
    assert [entry.name for entry in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-5"]

    resumed = trained(str(tiny_model), tmp_path / "cut", resume=True, **settings)

    assert resumed.state.global_step == 10
    assert torch.equal(weights(whole), weights(resumed))
    assert not torch.equal(weights(resumed), weights(resumed.reference)), "something was learnt"
    assert logged(whole.state.log_history) == logged(resumed.state.log_history)
    journals = [(tmp_path / folder / "completions.jsonl").read_text() for folder in ("whole", "cut")]
    assert journals[0] == journals[1]
    assert resumed._reference_pushed == (name in ("NashMD", "XPO"))
    # So that the equal logs are those of values that changed on both sides of the checkpoint.
    for field in ("beta", "mixture_coef", "alpha"):
        if isinstance(settings.get(field), list):
            first, second, third = settings[field]
            found = [entry[field] for entry in resumed.state.log_history if field in entry]
            assert found == pytest.approx([first, first, second, second, third])


class TestWithoutAKill:
    """Other paths to the same end; transformers generates."""

    @pytest.fixture(scope="class")
    def whole(self, tiny_model, tmp_path_factory):
        return trained(str(tiny_model), tmp_path_factory.mktemp("run"), **REPLAYED)

    @pytest.fixture(scope="class")
    def checkpoint(self, whole):
        return Path(whole.args.output_dir) / "checkpoint-5"

    def test_nothing_is_sampled_again(self, whole, checkpoint, tiny_model, tmp_path, monkeypatch):
        sampled = []
        original = GRPOTrainer._sample_batch

        def sample(self, slot):
            sampled.append(self.state.global_step)
            return original(self, slot)

        monkeypatch.setattr(GRPOTrainer, "_sample_batch", sample)
        trainer = trained(str(tiny_model), tmp_path, resume=checkpoint, **REPLAYED)
        assert sampled == [8]
        assert torch.equal(weights(trainer), weights(whole))

    def test_a_model_given_as_a_module_has_its_first_weights_as_reference(
        self, whole, checkpoint, tiny_model, tmp_path
    ):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        trainer = trained(model, tmp_path, resume=checkpoint, **REPLAYED)
        assert torch.equal(weights(trainer), weights(whole))
        assert not torch.equal(weights(trainer), weights(trainer.reference)), "something was learnt"
        assert logged(trainer.state.log_history) == logged(whole.state.log_history)

    def test_dropout_goes_on_where_it_was(self, tiny_model, tmp_path):
        settings = REPLAYED | {"adapter": True}
        whole = trained(str(tiny_model), tmp_path, **settings)
        resumed = trained(str(tiny_model), tmp_path, resume=tmp_path / "checkpoint-5", **settings)
        assert torch.equal(weights(whole), weights(resumed))
        assert logged(whole.state.log_history) == logged(resumed.state.log_history)

    def test_the_same_trainer_can_go_back(self, whole, checkpoint, tiny_model, tmp_path):
        trainer = trained(str(tiny_model), tmp_path, **REPLAYED)
        output = trainer.train(resume_from_checkpoint=str(checkpoint))
        assert logged(trainer.state.log_history) == logged(whole.state.log_history)
        assert output.training_loss == whole.state.log_history[-1]["train_loss"]

    def test_a_finished_run_takes_no_further_step(self, whole, tiny_model):
        trainer = resumable.make(str(tiny_model), whole.args.output_dir, **REPLAYED)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 10
        assert torch.equal(weights(trainer), weights(whole))
        assert logged(trainer.state.log_history) == logged(whole.state.log_history)

    def test_rows_written_after_the_checkpoint_are_not_written_twice(self, whole, checkpoint, tiny_model, tmp_path):
        """Those of the batch of step 1 to 8 were on disk already when the run was stopped after its next log."""
        settings = REPLAYED | {"save_steps": 1, "logging_steps": 4, "max_steps": 7, "lr_scheduler_type": "constant"}
        stopped = trained(str(tiny_model), tmp_path, **settings)
        before = (tmp_path / "completions.jsonl").read_text()
        assert before
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "kept")
        trained(str(tiny_model), stopped.args.output_dir, resume=tmp_path / "kept", **settings)
        assert (tmp_path / "completions.jsonl").read_text() == before

    def test_a_subclass_keeps_what_it_needs(self, checkpoint, tiny_model, tmp_path, monkeypatch):
        taken = []
        monkeypatch.setattr(
            GRPOTrainer, "_extra_state", lambda self: {"step": self.state.global_step, "w": torch.ones(2)}
        )
        monkeypatch.setattr(GRPOTrainer, "_load_extra_state", lambda self, state: taken.append(state))
        trained(str(tiny_model), tmp_path)
        trained(str(tiny_model), tmp_path, resume=tmp_path / "checkpoint-5")
        [state] = taken
        assert state["step"] == 5
        assert torch.equal(state["w"], torch.ones(2))


class TestErrors:
    @pytest.fixture(scope="class")
    def saved(self, tiny_model, tmp_path_factory):
        folder = tmp_path_factory.mktemp("saved")
        trained(str(tiny_model), folder, **REPLAYED | {"max_steps": 5})
        return folder / "checkpoint-5"

    @pytest.fixture
    def checkpoint(self, saved, tmp_path):
        return Path(shutil.copytree(saved, tmp_path / "checkpoint-5"))

    def resume(self, model, checkpoint, **settings):
        trainer = resumable.make(str(model), checkpoint.parent, **REPLAYED | {"max_steps": 6} | settings)
        before = weights(trainer)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        finally:
            assert torch.equal(before, weights(trainer)), "refused before anything is loaded"

    @pytest.mark.parametrize(
        "name", ["slipstream_rank0.pt", "rng_state.pth", "optimizer.pt", "scheduler.pt", "trainer_state.json"]
    )
    def test_a_missing_file(self, tiny_model, checkpoint, name):
        (checkpoint / name).unlink()
        with pytest.raises(
            FileNotFoundError, match=rf"{name} is missing.*pass model='.*checkpoint-5' and do not resume"
        ):
            self.resume(tiny_model, checkpoint)

    @pytest.mark.parametrize("name", ["slipstream_rank0.pt", "trainer_state.json"])
    def test_a_damaged_file(self, tiny_model, checkpoint, name):
        data = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=rf"{name} is damaged.*do not resume"):
            self.resume(tiny_model, checkpoint)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"seed": 7}, r"seed=7 \(saved: 42\)"),
            ({"data_seed": 7}, r"data_seed=7 \(saved: None\)"),
            ({"per_device_train_batch_size": 16}, r"per_device_train_batch_size=16 \(saved: 8\)"),
            (
                {"num_generations": 8, "num_iterations": 1},
                r"num_generations=8 \(saved: 4\), num_iterations=1 \(saved: 2\)",
            ),
            ({"rows": 40}, r"len\(train_dataset\)=40 \(saved: 64\)"),
            ({"shuffle_dataset": False}, r"shuffle_dataset=False \(saved: True\)"),
            ({"beta": 0.0}, r"reference model used=False \(saved: True\)"),
            (
                {"adapter": True},
                "the model below the adapter and the reference model, which a checkpoint does not hold",
            ),
        ],
    )
    def test_another_run(self, tiny_model, checkpoint, settings, message):
        with pytest.raises(ValueError, match=message):
            self.resume(tiny_model, checkpoint, **settings)

    def test_a_reference_that_is_not_the_initial_policy(self, checkpoint):
        with pytest.raises(ValueError, match="the reference model, which a checkpoint does not hold, differs"):
            self.resume(checkpoint, checkpoint)

    def test_an_adapter_on_another_model(self, tiny_model, tmp_path):
        trained(str(tiny_model), tmp_path, max_steps=5, adapter=True)
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        with torch.no_grad():
            next(model.parameters())[3, 3] += 1e-6
        with pytest.raises(ValueError, match="the model below the adapter, which a checkpoint does not hold, differs"):
            trained(model, tmp_path, max_steps=6, adapter=True, resume=tmp_path / "checkpoint-5")

    def test_other_prompts(self, tiny_model, checkpoint, monkeypatch):
        monkeypatch.setattr(resumable, "ROWS", resumable.ROWS[::-1])
        with pytest.raises(ValueError, match=r"row \d+ of train_dataset has another prompt"):
            self.resume(tiny_model, checkpoint)

    @pytest.mark.parametrize("name", ["slipstream_rank0.pt", "slipstream_rank1.pt"])
    def test_another_number_of_processes(self, tiny_model, checkpoint, name):
        """Whether there is a part for this rank or not."""
        state = torch.load(checkpoint / "slipstream_rank0.pt", weights_only=True)
        (checkpoint / "slipstream_rank0.pt").unlink()
        torch.save(state | {"world_size": 2}, checkpoint / name)
        with pytest.raises(
            ValueError, match=r"saved by 2 processes, but this run has 1.*Weights and optimizer could be"
        ):
            self.resume(tiny_model, checkpoint)

    def test_a_checkpoint_of_the_model_alone(self, tiny_model, tmp_path):
        trained(str(tiny_model), tmp_path, max_steps=5, save_only_model=True)
        checkpoint = tmp_path / "checkpoint-5"
        assert not list(checkpoint.glob("slipstream*"))
        with pytest.raises(FileNotFoundError, match="save_only_model=True"):
            self.resume(tiny_model, checkpoint)

    def test_no_checkpoint(self, tiny_model, tmp_path):
        trainer = resumable.make(str(tiny_model), tmp_path / "empty")
        with pytest.raises(FileNotFoundError, match=r"output_dir='.*empty' has no checkpoint"):
            trainer.train(resume_from_checkpoint=True)
        with pytest.raises(FileNotFoundError, match="resume_from_checkpoint='nowhere': there is no such folder"):
            trainer.train(resume_from_checkpoint="nowhere")

    def test_a_checkpoint_that_is_being_overwritten_is_no_checkpoint(self, tiny_model, checkpoint, monkeypatch):
        """A run anew in the same folder, stopped while it saves: no mixture of the two can be resumed."""
        trainer = resumable.make(str(tiny_model), checkpoint.parent, **REPLAYED)

        def stop(folder):
            raise KeyboardInterrupt

        monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        with pytest.raises(FileNotFoundError, match=r"slipstream_rank0.pt is missing"):
            self.resume(tiny_model, checkpoint)

    def test_state_that_needs_code_to_load(self, tiny_model, tmp_path, monkeypatch):
        monkeypatch.setattr(GRPOTrainer, "_extra_state", lambda self: {"where": Path("x")})
        with pytest.raises(TypeError, match=r"checkpoint\['extra'\]\['where'\] holds a PosixPath"):
            trained(str(tiny_model), tmp_path)
        assert not list((tmp_path / "checkpoint-5").glob("slipstream*"))
