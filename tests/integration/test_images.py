"""Training on prompts with images, by transformers' generation; and what is refused beforehand."""

from __future__ import annotations

import math

import pytest
import tiny_vision
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from slipstream import (
    GRPOConfig,
    GRPOTrainer,
    NashMDConfig,
    NashMDTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from slipstream.trainers import loading

COLORS = [(210, 20, 20), (20, 210, 20), (20, 20, 210), (120, 120, 30)]


def user(content):
    return [{"role": "user", "content": content}]


def rows(count=12):
    """Some with one image, of three sizes, some with two, some without."""
    made = []
    for i in range(count):
        picture = tiny_vision.picture(COLORS[i % 4], [(24, 24), (48, 24), (24, 48)][i % 3])
        pictures = [] if i % 4 == 3 else [picture] * (1 + (i % 5 == 4))
        made.append({"prompt": user("What color?"), "images": pictures, "number": i})
    return Dataset.from_list(made)


def vowels(completions, number, **columns):
    assert not {"image", "images"} & columns.keys()
    return [float(sum(c in "aeiou" for c in message[0]["content"])) for message in completions]


def settings(folder, **values):
    return {
        "output_dir": str(folder), "max_completion_length": 8, "per_device_train_batch_size": 8, "max_steps": 2,
        "logging_steps": 1, "learning_rate": 1e-2, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
    } | values  # fmt: skip


@pytest.fixture
def qwen():
    return tiny_vision.qwen2_5_vl()


@pytest.fixture
def idefics(tiny_vision_model):
    return str(tiny_vision_model)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_learns(trainer, seen="visual"):
    before = weights(trainer.model)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(entry["loss"]) for entry in logs)
    after = weights(trainer.model)
    changed = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert any(seen in name for name in changed)
    assert any("visual" not in name and "vision" not in name for name in changed)
    trainer.close()
    return logs


def test_grpo_with_a_reference_and_an_evaluation(qwen, tmp_path):
    model, processor = qwen
    args = GRPOConfig(
        **settings(tmp_path, num_generations=4, beta=0.1, num_iterations=2, eval_strategy="steps", eval_steps=2,
                   per_device_eval_batch_size=8, max_steps=3)
    )  # fmt: skip
    trainer = GRPOTrainer(model, vowels, args, rows(), {"a": rows(3)}, processor)
    assert not trainer.packer.packed
    assert_learns(trainer)
    assert "eval_a_reward" in trainer.state.log_history[-2] | trainer.state.log_history[-1]
    assert "[image]" in (tmp_path / "completions.jsonl").read_text()
    assert (tmp_path / "report.html").exists()


def test_rloo_by_a_name(idefics, tmp_path):
    trainer = RLOOTrainer(idefics, vowels, RLOOConfig(**settings(tmp_path, num_generations=2)), rows())
    assert type(trainer.processing_class).__name__ == "Idefics3Processor"
    assert_learns(trainer, seen="vision_model")


def test_online_dpo(qwen, tmp_path):
    model, processor = qwen
    args = OnlineDPOConfig(**settings(tmp_path, max_new_tokens=8) | {"max_completion_length": 8})
    assert_learns(OnlineDPOTrainer(model, reward_funcs=vowels, args=args, train_dataset=rows(),
                                   processing_class=processor))  # fmt: skip


def test_nash_md_mixes_two_models_that_see(qwen, tmp_path):
    model, processor = qwen
    args = NashMDConfig(**settings(tmp_path))
    assert_learns(NashMDTrainer(model, reward_funcs=vowels, args=args, train_dataset=rows(),
                                processing_class=processor))  # fmt: skip


def test_one_image_column_and_text_alone(qwen, tmp_path):
    model, processor = qwen
    one = Dataset.from_list([{"prompt": r["prompt"], "image": (r["images"] or [None])[0], "number": 0} for r in rows()])
    args = GRPOConfig(**settings(tmp_path, num_generations=4, max_steps=1))
    assert_learns(GRPOTrainer(model, vowels, args, one, processing_class=processor))


def test_a_model_that_could_see_learns_from_text(qwen, tmp_path):
    model, processor = qwen
    args = GRPOConfig(**settings(tmp_path, num_generations=4))
    trainer = GRPOTrainer(model, vowels, args, rows().remove_columns("images"), processing_class=processor)
    assert trainer.args.ddp_find_unused_parameters  # or a second rank would wait for the part that sees
    trainer.train()
    trainer.evaluate(rows(3))  # the constructor did not know of any images
    trainer.close()


def test_a_run_that_is_resumed_goes_on_as_if_it_had_not_stopped(idefics, tmp_path):
    values = settings(
        tmp_path, num_generations=4, max_steps=3, steps_per_generation=2, save_strategy="steps", save_steps=1
    )
    whole = GRPOTrainer(idefics, vowels, GRPOConfig(**values), rows())
    whole.train()
    resumed = GRPOTrainer(idefics, vowels, GRPOConfig(**values), rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(weights(resumed.model)[name], value, atol=0, rtol=0)
    # The processor is saved beside the model, so that a checkpoint is one to start from.
    assert (tmp_path / "checkpoint-3" / "processor_config.json").exists()


# What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["image", "images"])
def test_a_model_of_text_alone_refuses_images_before_it_is_loaded(tiny_model, tmp_path, monkeypatch, column):
    monkeypatch.setattr(loading, "load_policy", lambda *_: pytest.fail("the model was loaded"))
    given = Dataset.from_list([{"prompt": user("x"), column: tiny_vision.picture(COLORS[0])}] * 8)
    with pytest.raises(ValueError, match=rf"train_dataset has a column '{column}', and .*qwen2.* takes text alone.*"
                                         rf"dataset.remove_columns\(\['{column}'\]\)"):  # fmt: skip
        GRPOTrainer(str(tiny_model), vowels, GRPOConfig(**settings(tmp_path)), given)


def test_two_columns_of_images_are_refused(qwen, tmp_path):
    model, processor = qwen
    both = rows().map(lambda row: {"image": row["images"][0] if row["images"] else None})
    with pytest.raises(ValueError, match="train_dataset has columns 'images' and 'image'"):
        GRPOTrainer(model, vowels, GRPOConfig(**settings(tmp_path)), both, processing_class=processor)


def test_a_row_with_more_places_than_images_is_named(qwen, tmp_path):
    model, processor = qwen
    parts = user([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Same?"}])
    given = Dataset.from_list([{"prompt": parts, "images": [tiny_vision.picture(COLORS[0])], "number": 0}] * 8)
    trainer = GRPOTrainer(model, vowels, GRPOConfig(**settings(tmp_path)), given, processing_class=processor)
    with pytest.raises(ValueError, match=r"row \d of the dataset has 1 image for 2 image parts"):
        trainer.train()


def test_a_prompt_that_images_make_too_long_is_named(qwen, tmp_path):
    model, processor = qwen
    model.config.get_text_config().max_position_embeddings = 32
    args = GRPOConfig(**settings(tmp_path, num_generations=4))
    trainer = GRPOTrainer(model, vowels, args, rows(), processing_class=processor)
    with pytest.raises(ValueError, match=r"row \d+ of the dataset has \d+ tokens with its images.*model's limit of 32"):
        trainer.train()


def test_a_tokenizer_makes_no_tensors_of_images(idefics, tmp_path):
    with pytest.raises(TypeError, match=r"processing_class is a .*AutoProcessor"):
        GRPOTrainer(idefics, vowels, GRPOConfig(**settings(tmp_path)), rows(),
                    processing_class=AutoTokenizer.from_pretrained(idefics))  # fmt: skip


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"rollout_func": lambda prompts, trainer: {}}, "rollout_func"),
        ({"use_transformers_continuous_batching": True}, {}, "use_transformers_continuous_batching"),
        ({"fsdp": True}, {}, "FSDP, DeepSpeed"),
    ],
)
def test_what_does_not_go_with_images_is_said_early(qwen, tmp_path, config, options, message):
    model, processor = qwen
    with pytest.raises(NotImplementedError, match=f"train_dataset has a column 'images'.*{message}"):
        GRPOTrainer(model, vowels, GRPOConfig(**settings(tmp_path, **config)), rows(), processing_class=processor,
                    **options)  # fmt: skip


def test_a_reward_model_would_score_the_text_alone(qwen, tmp_path):
    model, processor = qwen
    with pytest.raises(NotImplementedError, match="reward model some/model, which would score the text alone"):
        GRPOTrainer(model, "some/model", GRPOConfig(**settings(tmp_path)), rows(), processing_class=processor)
