"""Packed rows in whole runs: the weights that padded rows give, for every trainer, or padding with a reason."""

from __future__ import annotations

import pytest
import torch
from rounds import ALL, make, weights

from slipstream import GRPOConfig


@pytest.mark.parametrize("name", ["GRPO", *ALL])
def test_packed_rows_teach_what_padded_ones_do(tiny_model, tmp_path, name):
    made = {}
    for packing in ({"packing": False}, {"packing": True}, {"packing": True, "share_prompts": False},
                    {"packing": True, "max_tokens_per_micro_batch": 20, "gradient_checkpointing": True}):  # fmt: skip
        values = packing | {"beta": 0.1, "optim": "sgd", "learning_rate": 1.0}
        if name == "GRPO":
            values |= {"per_device_train_batch_size": 8, "num_generations": 4}
        trainer = make(name, str(tiny_model), tmp_path, **values)
        batches = []
        packed = trainer.packer._micro_batch
        trainer.packer._micro_batch = lambda *a, packed=packed, batches=batches: (
            batches.append(packed(*a)) or batches[-1]
        )
        trainer.train()
        made[str(packing)] = weights(trainer.model)
        assert trainer.packer.packed is packing["packing"]
        if packing["packing"]:
            assert all(len(batch.input_ids_BT) == 1 for batch in batches)
        if packing.get("max_tokens_per_micro_batch"):
            assert len(batches) > 4
    padded, *others = made.values()
    for values in others:
        assert (values - padded).abs().max() < 1e-5
    assert (padded - weights(type(trainer.model).from_pretrained(tiny_model))).abs().max() > 1e-3


def test_a_model_that_cannot_be_packed_is_padded_and_says_why(tmp_path):
    import tiny
    from transformers import MambaConfig, MambaForCausalLM

    vocabulary = tiny.tokenizer()
    model = MambaForCausalLM(
        MambaConfig(vocab_size=128, hidden_size=32, state_size=4, num_hidden_layers=2,
                    eos_token_id=vocabulary.eos_token_id, pad_token_id=vocabulary.pad_token_id)
    )  # fmt: skip
    with pytest.warns(UserWarning, match="instead of packed, since MambaForCausalLM cannot be packed: "):
        trainer = make("RLOO", model, tmp_path, packing=True, beta=0.0, arguments={"processing_class": vocabulary})
    trainer.train()
    assert not trainer.packer.packed
    assert torch.isfinite(weights(trainer.model)).all()


def test_a_budget_of_tokens_is_checked():
    with pytest.raises(ValueError, match=r"max_tokens_per_micro_batch=0 .*>= 1"):
        GRPOConfig("out", max_tokens_per_micro_batch=0)
