"""The budget of tokens that is measured on an NVIDIA GPU: it fits, uses the memory well, and leaves no trace."""

from __future__ import annotations

import pytest
import tiny
import torch
from datasets import Dataset

from slipstream import GRPOConfig, GRPOTrainer
from slipstream.modeling.budget import CudaMeter

pytestmark = pytest.mark.gpu

GIB = 1 << 30
ROWS = [{"prompt": f"{a}+{b}="} for a in range(16) for b in range(16)]


def digits(completions, **_):
    """The share of digits."""
    return [sum(c.isdigit() for c in text) / 64 for text in completions]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("models") / "small", hidden=256, layers=4)


def make(path, folder, **values):
    settings = {
        "packing": True, "max_completion_length": 64, "per_device_train_batch_size": 512, "num_generations": 8,
        "max_steps": 2, "logging_steps": 1, "report_to": [], "gradient_checkpointing": False, "save_strategy": "no",
        "disable_tqdm": True, "html_report": False, "bf16": True,
    } | values  # fmt: skip
    return GRPOTrainer(str(path), digits, GRPOConfig(str(folder), **settings), Dataset.from_list(ROWS))


@pytest.fixture
def trainer(path, tmp_path):
    made = make(path, tmp_path)
    # As training does: this is what brings autocast.
    made.model_wrapped = made.accelerator.prepare_model(made.model)
    return made


def sample(trainer):
    return trainer._sample_batch(next(iter(trainer._sampler))[0])


class Limited(CudaMeter):
    """The same with less memory free, so that the budget is below a step's tokens."""

    free_bytes = GIB // 4

    def free(self):
        assert super().free() > self.free_bytes
        return self.free_bytes


def test_a_micro_batch_of_the_budget_takes_what_was_foretold(trainer):
    rollouts = sample(trainer)
    meter = Limited(trainer.accelerator.device)
    weights = [p.clone() for p in trainer.model.parameters()]
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    trainer._find_budget(rollouts, meter)
    tokens = trainer.packer.max_tokens
    assert 1024 < tokens < sum(len(r.prompt.ids) + len(r.completion.ids) for r in rollouts)
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))
    assert all(p.grad is None for p in trainer.model.parameters())
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], torch.cuda.get_rng_state())
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters())
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    taken = meter.peak(lambda: trainer._learn(trainer.model_wrapped, rollouts))
    promised = 2 * sum(p.nbytes for p in trainer.model.parameters())
    assert 0.35 * (meter.free_bytes - promised) < taken < meter.free_bytes - promised


def test_a_run_measures_once(path, tmp_path, capsys):
    trainer = make(path, tmp_path)
    trainer.train()
    printed = capsys.readouterr().out
    assert printed.count(f"max_tokens_per_micro_batch {trainer.packer.max_tokens} (measured: ") == 1
    # All of a step fits, and no more is asked for.
    rows = 512 * (max(len(trainer.renderer.render(row, 0).ids) for row in ROWS) + 64)
    assert trainer.packer.max_tokens == -(-rows // 256) * 256


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_wakes_when_the_trainer_has_used_its_memory(path, tmp_path, level):
    trainer = make(
        path, tmp_path, use_vllm=True, vllm_max_model_length=128, vllm_enable_sleep_mode=True, vllm_sleep_level=level,
        vllm_gpu_memory_utilization=0.5, vllm_engine_kwargs={"enforce_eager": True},
    )  # fmt: skip
    keep = trainer._learn

    def learn(model, rollouts):
        learned = keep(model, rollouts)
        # What the allocator is left with after micro-batches that take nearly all of the memory.
        torch.empty(int(0.8 * torch.cuda.mem_get_info()[0]), dtype=torch.uint8, device="cuda")
        return learned

    trainer._learn = learn
    try:
        trainer.train()
    finally:
        trainer.close()
    assert trainer.state.global_step == 2
