"""RLOO's and the pairwise trainers' configurations: names and defaults of TRL, and errors before anything loads."""

from __future__ import annotations

import warnings
from inspect import signature

import pytest

import slipstream
from slipstream.trainers import schedule

PAIRWISE = ["OnlineDPO", "NashMD", "XPO"]


def config(name, **values):
    return getattr(slipstream, f"{name}Config")(output_dir="unused", report_to=[], **values)


def test_rloo_has_the_peers_fields_and_defaults():
    """As in TRL 1.16."""
    made = config("RLOO")
    defaults = {
        "learning_rate": 1e-6, "model_init_kwargs": None, "router_aux_loss_coef": None, "disable_dropout": False,
        "remove_unused_columns": False, "num_generations": 2, "num_generations_eval": None,
        "max_completion_length": 512, "ds3_gather_for_generation": True, "shuffle_dataset": True, "temperature": 1.0,
        "top_p": 1.0, "top_k": 0, "min_p": None, "generation_kwargs": None, "chat_template_kwargs": None,
        "repetition_penalty": 1.0, "cache_implementation": None, "use_vllm": False, "vllm_mode": "colocate",
        "vllm_model_impl": "vllm", "vllm_enable_sleep_mode": False, "vllm_structured_outputs_regex": None,
        "vllm_server_base_url": None, "vllm_server_host": "0.0.0.0", "vllm_server_port": 8000,
        "vllm_server_timeout": 240.0, "vllm_group_port": 51216, "vllm_gpu_memory_utilization": 0.3,
        "vllm_max_model_length": None, "vllm_tensor_parallel_size": 1, "beta": 0.05, "num_iterations": 1,
        "epsilon": 0.2, "epsilon_high": None, "reward_weights": None, "normalize_advantages": False,
        "reward_clip_range": None, "mask_truncated_completions": False, "sync_ref_model": False,
        "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512, "log_completions": False, "log_multimodal": True,
        "num_completions_to_print": None, "log_unique_prompts": False, "trust_remote_code": False,
        "use_transformers_continuous_batching": False, "transformers_continuous_batching_config": None,
        "use_transformers_paged": False,
    }  # fmt: skip
    assert {name: getattr(made, name) for name in defaults} == defaults


@pytest.mark.parametrize("name", PAIRWISE)
def test_the_pairwise_ones_have_the_peers_fields_and_defaults(name):
    """As TRL 1.16's OnlineDPOConfig; Nash-MD's and XPO's were the same and one more."""
    made = config(name)
    defaults = {
        "learning_rate": 5e-7, "remove_unused_columns": False, "reward_model_path": None, "max_new_tokens": 64,
        "max_length": 512, "temperature": 0.9, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0,
        "generation_kwargs": None, "cache_implementation": None, "missing_eos_penalty": None, "beta": 0.1,
        "loss_type": "sigmoid", "disable_dropout": True, "use_vllm": False, "vllm_model_impl": "vllm",
        "vllm_structured_outputs_regex": None, "vllm_gpu_memory_utilization": 0.55, "vllm_mode": "colocate",
        "vllm_server_base_url": None, "vllm_server_host": "0.0.0.0", "vllm_server_port": 8000,
        "vllm_server_timeout": 240.0, "vllm_group_port": 51216, "vllm_tensor_parallel_size": 1,
        "vllm_enable_sleep_mode": False, "ds3_gather_for_generation": True, "model_init_kwargs": None,
        "trust_remote_code": False, "reward_weights": None,
    }  # fmt: skip
    assert {field: getattr(made, field) for field in defaults} == defaults
    assert {"NashMD": "mixture_coef", "XPO": "alpha"}.get(name, "beta") in vars(made)
    assert (made.per_device_train_batch_size, made.generation_batch_size) == (8, 16), "sizes count prompts"


OF_REWARDS = ["model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class",
              "reward_processing_classes", "callbacks", "optimizers", "quantization_config", "peft_config"]  # fmt: skip
OF_PAIRS = ["model", "ref_model", "reward_funcs", "args", "data_collator", "train_dataset", "eval_dataset",
            "processing_class", "reward_processing_classes", "peft_config", "compute_metrics", "callbacks",
            "optimizers", "preprocess_logits_for_metrics"]  # fmt: skip
PEERS = {
    "GRPO": [*OF_REWARDS, "tools", "rollout_func", "environment_factory"], "RLOO": OF_REWARDS,
    "OnlineDPO": OF_PAIRS, "NashMD": OF_PAIRS, "XPO": OF_PAIRS,
}  # fmt: skip


@pytest.mark.parametrize("name", PEERS)
def test_constructors_take_the_peers_arguments_in_their_order(name):
    """As in TRL 1.16; more may follow."""
    parameters = signature(getattr(slipstream, f"{name}Trainer").__init__).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    assert positional[: len(PEERS[name])] == PEERS[name]
    assert all(p.default in (None, (None, None)) for p in parameters if p.name not in ("self", "model"))


@pytest.mark.parametrize("name", PAIRWISE)
class TestPairwise:
    @pytest.mark.parametrize("field", ["max_new_tokens", "max_completion_length"])
    def test_a_completions_length_has_two_names(self, name, field):
        made = config(name, **{field: 32})
        assert (made.max_new_tokens, made.max_completion_length, made.sampling().max_tokens) == (32, 32, 32)

    def test_the_sampler_is_not_asked_for_probabilities(self, name):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert config(name, use_vllm=True, top_p=0.9).sampling().logprobs is False

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"max_new_tokens": 8, "max_completion_length": 9}, "max_new_tokens=8 and max_completion_length=9"),
            ({"max_length": 64}, "max_length=64 leaves no room"),
            ({"max_new_tokens": 0}, "max_completion_length=0 .*>= 1"),
            ({"beta": 0.0}, r"beta=0.0 .*> 0"),
            ({"beta": []}, r"beta=\[\] .*one for each epoch"),
            ({"beta": [0.1, -0.1]}, r"beta\[1\]=-0.1 .*> 0"),
            ({"missing_eos_penalty": 0}, "missing_eos_penalty=0 .*> 0"),
            ({"num_generations": 4}, "num_generations=4 is not one of 2"),
            ({"generation_batch_size": 24}, "multiple of the 16 completions that per_device_train_batch_size=8 makes"),
            ({"num_generations_eval": 1}, "num_generations_eval=1 is not one of None, 2"),
        ],
    )
    def test_wrong_values_are_named(self, name, values, message):
        with pytest.raises(ValueError, match=message):
            config(name, **values)

    def test_it_survives_a_round_trip(self, name):
        made = config(name, beta=[0.1, 0.2], gradient_accumulation_steps=2)
        fields = ("beta", "max_new_tokens", "max_completion_length", "generation_batch_size", "steps_per_generation")
        again = config(name, gradient_accumulation_steps=2, **{f: getattr(made, f) for f in fields})
        assert [getattr(made, f) for f in fields] == [getattr(again, f) for f in fields]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("RLOO", {"num_generations": 1}, "num_generations=1 .*>= 2"),
        ("RLOO", {"beta": -1}, "beta=-1 .*>= 0"),
        ("RLOO", {"reward_clip_range": (1.0,)}, r"reward_clip_range=\(1.0,\) .*lowest and the highest"),
        ("RLOO", {"reward_clip_range": (1.0, 0.0)}, r"reward_clip_range\[1\]=0.0 .*> 1.0"),
        ("RLOO", {"beta": 0.0, "sync_ref_model": True}, "beta=0.0 loads none"),
        ("RLOO", {"vllm_importance_sampling_mode": "mask"}, "vllm_importance_sampling_mode='mask'"),
        ("OnlineDPO", {"loss_type": "sigmoit"}, "Did you mean 'sigmoid'"),
        ("XPO", {"alpha": -1e-5}, "alpha=-1e-05 .*>= 0"),
        ("NashMD", {"mixture_coef": 1.5}, "mixture_coef=1.5 .*<= 1"),
        ("NashMD", {"use_transformers_continuous_batching": True}, r"mixture_coef=.* no place to mix logits"),
        ("NashMD", {"mixture_coef": [0.5, 2]}, r"mixture_coef\[1\]=2 .*<= 1"),
    ],
)
def test_wrong_values_are_named(name, values, message):
    with pytest.raises(ValueError, match=message):
        config(name, **values)


def test_a_range_may_come_from_yaml():
    assert config("RLOO", reward_clip_range=[-1, 1]).reward_clip_range == (-1, 1)


def test_who_samples_from_the_reference():
    asks = {
        "XPO": config("XPO"), "NashMD": config("NashMD"), "later": config("NashMD", mixture_coef=[0.0, 0.5]),
        "never": config("NashMD", mixture_coef=0.0), "OnlineDPO": config("OnlineDPO"), "RLOO": config("RLOO"),
    }  # fmt: skip
    assert [name for name, made in asks.items() if made.samples_from_reference] == ["XPO", "NashMD", "later"]


def test_values_by_epoch():
    values = schedule.checked("beta", [0.3, 0.2, 0.1])
    assert [schedule.present(values, epoch) for epoch in (0, 1, 2, 7)] == [0.3, 0.2, 0.1, 0.1]
    assert schedule.checked("beta", [0.3]) == schedule.present(0.3, 5) == 0.3
    assert schedule.highest(values) == schedule.highest(0.3) == 0.3


@pytest.mark.parametrize("name", ["online_dpo", "nash_md", "xpo"])
def test_the_peers_import_paths(name):
    from importlib import import_module

    place = import_module(f"slipstream.experimental.{name}")
    assert all(getattr(place, exported) is getattr(slipstream, exported) for exported in place.__all__)
    assert len(place.__all__) == 2


@pytest.mark.parametrize("name", ["RLOO", *PAIRWISE])
def test_transformers_argument_parser_reads_it(name):
    from transformers import HfArgumentParser

    parser = HfArgumentParser(getattr(slipstream, f"{name}Config"))
    (made,) = parser.parse_args_into_dataclasses(["--output_dir", "o", "--report_to", "none", "--beta", "0.3"])
    assert made.beta == 0.3
    assert {"NashMD": "mixture_coef", "XPO": "alpha"}.get(name, "beta") in vars(made)
