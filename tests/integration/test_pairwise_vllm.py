"""What XPO and Nash-MD sample of a reference, with vLLM in this process."""

from __future__ import annotations

import pytest
import torch
from engines import greedy
from rounds import adapter, history, load, make


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
