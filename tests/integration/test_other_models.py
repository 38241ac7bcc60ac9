"""Models that an engine and transformers could take for two: what the engine samples is what the trainer scores."""

from __future__ import annotations

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import Phi3Config, Phi3ForCausalLM

from slipstream import GRPOConfig, GRPOTrainer
from slipstream.modeling.rope import settle_long_rope
from slipstream.trainers import inputs

ROWS = [{"prompt": f"What is {a} + {b} - {a}?"} for a in range(10, 14) for b in range(10, 14)]
ORIGINAL = 40  # tokens, fewer than the longest of these rows have
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}


def digits(completions, **_):
    return [float(sum(c.isdigit() for c in text)) for text in completions]


def config(folder, **values):
    settings = {
        "max_completion_length": 8, "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2,
        "logging_steps": 1, "learning_rate": 1e-3, "report_to": [], "gradient_checkpointing": False,
        "save_strategy": "no", "disable_tqdm": True, "html_report": False, "use_vllm": True,
    } | values  # fmt: skip
    return GRPOConfig(output_dir=str(folder), **settings)


def assert_same_model(model, folder, **values):
    trainer = GRPOTrainer(model, digits, config(folder, **values), Dataset.from_list(ROWS))
    trainer.train()
    differences = [
        entry["sampling/sampling_logp_difference/max"] for entry in trainer.state.log_history if "loss" in entry
    ]
    trainer.close()
    assert len(differences) == 2
    assert max(differences) < 1e-4


@pytest.fixture(scope="module")
def long_rope(tmp_path_factory):
    """Folder of a tiny Phi 3 whose short and long factors differ much."""
    folder = tmp_path_factory.mktemp("models") / "phi3"
    vocabulary = tiny.tokenizer()
    torch.manual_seed(0)
    model = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=256, original_max_position_embeddings=ORIGINAL,
            rope_parameters={
                "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 16,
                "long_factor": [float(2 + i) for i in range(16)], "original_max_position_embeddings": ORIGINAL,
            },
            eos_token_id=vocabulary.eos_token_id, pad_token_id=vocabulary.pad_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    vocabulary.save_pretrained(folder)
    return folder


def test_what_model_init_kwargs_changes_reaches_the_engine(tiny_model, tmp_path):
    options = {"rope_parameters": LINEAR, "attn_implementation": "sdpa"}
    assert_same_model(str(tiny_model), tmp_path, vllm_max_model_length=64, model_init_kwargs=options)


@pytest.mark.parametrize("longest", [ORIGINAL, 64])
def test_long_rope_has_the_engines_factors(long_rope, tmp_path, longest):
    assert_same_model(str(long_rope), tmp_path, vllm_max_model_length=longest)


def test_a_row_does_not_depend_on_the_length_of_others(long_rope):
    model = Phi3ForCausalLM.from_pretrained(long_rope).eval()
    row, longer = torch.randint(5, 100, (2, 60), generator=torch.Generator().manual_seed(1))

    def difference():
        """Of a short row alone, and beside a longer one."""
        mask = torch.ones(2, 60, dtype=torch.long)
        mask[0, 30:] = 0
        with torch.no_grad():
            alone = model(row[None, :30]).logits[0]
            beside = model(torch.stack([row, longer]), attention_mask=mask).logits[0, :30]
        return (alone - beside).abs().max().item()

    assert difference() > 0.1
    assert not settle_long_rope(model, ORIGINAL)
    assert settle_long_rope(model, 60)
    assert difference() < 1e-5


def test_rows_are_no_longer_than_the_engine_takes_by_default(long_rope, tmp_path):
    assert inputs.longest_sequence(str(long_rope), config(tmp_path)) == (ORIGINAL, "vllm_max_model_length")
    assert inputs.longest_sequence(str(long_rope), config(tmp_path, use_vllm=False)) == (256, inputs.MODEL_LIMIT)
    changed = config(tmp_path, use_vllm=False, model_init_kwargs={"max_position_embeddings": 128, "device_map": "cpu"})
    assert inputs.longest_sequence(str(long_rope), changed) == (128, inputs.MODEL_LIMIT)
