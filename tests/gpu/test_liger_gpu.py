"""Liger's kernels in a whole run: beside packing, shared prompts, our own head and checkpointing."""

from __future__ import annotations

import pytest
import tiny
import torch
from datasets import Dataset
from transformers.models.qwen2 import modeling_qwen2

from slipstream import GRPOConfig, GRPOTrainer

pytestmark = pytest.mark.gpu


def variety(completions, **columns):
    return [float(len(set(text))) for text in completions]


@pytest.fixture(autouse=True)
def plain_module():
    """Liger puts its functions into the module, for all models of the process."""
    before = dict(vars(modeling_qwen2))
    yield
    vars(modeling_qwen2).update(before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_ends_with_the_same_weights(tmp_path, checkpointing):
    pytest.importorskip("liger_kernel")
    model = tiny.build(tmp_path / "model", hidden=128)
    rows = Dataset.from_list([{"prompt": f"{i} plus {i} is "} for i in range(8)])
    ends = []
    for liger in (False, True):
        config = GRPOConfig(
            output_dir=str(tmp_path / str(liger)), per_device_train_batch_size=8, num_generations=4, max_steps=2,
            max_completion_length=12, bf16=False, use_vllm=False, report_to=[], learning_rate=1e-3, html_report=False,
            gradient_checkpointing=checkpointing, use_liger_kernel=liger, disable_tqdm=True, beta=0.0,
        )  # fmt: skip
        trainer = GRPOTrainer(model=str(model), args=config, reward_funcs=variety, train_dataset=rows)
        assert trainer.packer.packed
        before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - before)
    assert ends[0].norm() > 0
    # Adam's first steps go by the signs of gradients, which rounding turns where they are next to nothing.
    assert (ends[1] - ends[0]).norm() < 0.1 * ends[0].norm()
