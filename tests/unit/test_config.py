"""Every wrong value is an error before anything loads, and says what is allowed."""

from __future__ import annotations

import pytest

from slipstream import GRPOConfig


def config(**values):
    return GRPOConfig(output_dir="unused", report_to=[], **values)


def test_defaults_are_the_fields_documented_ones():
    made = config()
    assert (made.learning_rate, made.beta, made.epsilon, made.loss_type) == (1e-6, 0.0, 0.2, "dapo")
    assert (made.num_generations, made.max_completion_length, made.temperature) == (8, 512, 1.0)
    assert (made.vllm_mode, made.vllm_gpu_memory_utilization, made.use_vllm) == ("colocate", 0.3, False)
    assert made.vllm_importance_sampling_mode == "sequence_mask"
    assert made.vllm_importance_sampling_clip_max == 3.0
    assert made.gradient_checkpointing is True
    assert made.bf16 is False, "no accelerator, no bf16"
    assert (made.generation_batch_size, made.steps_per_generation) == (8, 1)


def test_generation_batch_follows_from_the_batch_sizes():
    made = config(per_device_train_batch_size=4, gradient_accumulation_steps=6, num_generations=3)
    assert (made.generation_batch_size, made.steps_per_generation) == (24, 6)
    made = config(per_device_train_batch_size=4, generation_batch_size=16)
    assert made.steps_per_generation == 4
    assert config(per_device_train_batch_size=4, steps_per_generation=2).generation_batch_size == 8


def test_a_config_survives_a_round_trip():
    made = config(per_device_train_batch_size=16, steps_per_generation=2)
    again = GRPOConfig(**{f: getattr(made, f) for f in ("output_dir", "per_device_train_batch_size")} | {
        "generation_batch_size": made.generation_batch_size, "steps_per_generation": made.steps_per_generation,
        "report_to": [],
    })  # fmt: skip
    assert again.generation_batch_size == made.generation_batch_size


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_generations": 1}, "num_generations=1 .*>= 2"),
        ({"num_generations": 3}, "generation_batch_size=8 .*must be a multiple of num_generations=3"),
        ({"generation_batch_size": 12}, "must be a multiple of the 8 completions that per_device_train_batch_size=8"),
        ({"generation_batch_size": 16, "steps_per_generation": 3}, "contradict each other"),
        ({"temperature": 0}, r"temperature=0 .*> 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 1.5}, r"top_p=1.5 .*<= 1"),
        ({"top_k": -1}, r"top_k=-1 .*an integer >= 0"),
        ({"max_completion_length": 0}, "max_completion_length=0 .*>= 1"),
        ({"epsilon": -0.1}, "epsilon=-0.1 .*>= 0"),
        ({"beta": -1}, "beta=-1 .*>= 0"),
        ({"num_iterations": 0}, "num_iterations=0 .*>= 1"),
        ({"loss_type": "dapp"}, "loss_type='dapp' is not one of 'dapo'.*Did you mean 'dapo'"),
        ({"scale_rewards": "groups"}, "scale_rewards='groups' .*Did you mean 'group'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level='word'"),
        ({"vllm_mode": "remote"}, "vllm_mode='remote' is not one of 'colocate', 'server'"),
        ({"vllm_server_port": 0}, "vllm_server_port=0 .*>= 1"),
        ({"vllm_server_timeout": 0}, "vllm_server_timeout=0 .*> 0"),
        ({"vllm_server_base_url": "localhost:8000"}, "vllm_server_base_url='localhost:8000' .*http://"),
        ({"vllm_model_impl": "hf"}, "vllm_model_impl='hf'"),
        ({"vllm_sleep_level": 3}, "vllm_sleep_level=3"),
        ({"vllm_gpu_memory_utilization": 0}, "vllm_gpu_memory_utilization=0 .*> 0"),
        ({"vllm_importance_sampling_mode": "mask"}, "vllm_importance_sampling_mode='mask'"),
        ({"vllm_importance_sampling_clip_min": 4.0}, "must be below vllm_importance_sampling_clip_max=3.0"),
        ({"vllm_importance_sampling_clip_max": None}, "both None"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True is not supported"),
        ({"reward_timeout": 0}, "reward_timeout=0 .*> 0"),
        ({"num_completions_to_print": 0}, "num_completions_to_print=0"),
        ({"reward_weights": 0.5}, "reward_weights=0.5 .*list of numbers"),
        ({"reward_weights": [1.0, float("nan")]}, r"reward_weights\[1\]=nan .*a number"),
        ({"max_tool_calling_iterations": 0}, "max_tool_calling_iterations=0 .*>= 1"),
        ({"log_completions_hub_repo": "me/data"}, "log_completions_hub_repo='me/data' has nothing to upload"),
        ({"loss_type": "cispo"}, "epsilon_high=None does not go with loss_type='cispo'.*above 1"),
        ({"loss_type": "cispo", "epsilon_high": 0.3}, "epsilon_high=0.3 does not go with"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "set importance_sampling_level='token'"),
        ({"loss_type": "vespo", "use_vllm": True}, "'token_truncate' or 'token_mask'"),
        ({"sync_ref_model": True}, "beta=0.0 loads none"),
        ({"top_entropy_quantile": 0.0}, "top_entropy_quantile=0.0 .*> 0"),
        ({"top_entropy_quantile": 1.1}, "top_entropy_quantile=1.1 .*<= 1"),
        ({"ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha=1.5 .*<= 1"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps=0"),
        ({"delta": -1.0}, "delta=-1.0 .*>= 0"),
        ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos=0.0 .*> 0"),
        ({"entropy_coef_min": 0.5, "entropy_coef_max": 0.1}, "entropy_coef_max=0.1 .*>= 0.5"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation='sum'"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


@pytest.mark.parametrize(
    ("values", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"vllm_server_host": "trainer-7", "vllm_server_port": 9000}, "http://trainer-7:9000"),
        ({"vllm_server_base_url": "https://policy.example:8443/"}, "https://policy.example:8443"),
    ],
)
def test_where_the_server_is(values, url):
    assert config(use_vllm=True, vllm_mode="server", **values).server_url == url


def test_server_mode_says_which_settings_are_the_servers():
    with pytest.warns(UserWarning, match="vllm_tensor_parallel_size=2 changes nothing with vllm_mode='server'"):
        config(use_vllm=True, vllm_mode="server", vllm_tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"vllm_engine_kwargs=.*give them to it as flags"):
        config(use_vllm=True, vllm_mode="server", vllm_engine_kwargs={"max_num_batched_tokens": 64})


@pytest.mark.parametrize(
    "values",
    [
        {"top_p": 0.9},
        {"vllm_structured_outputs_regex": "[0-9]+"},
        {"generation_kwargs": {"presence_penalty": 0.5}},
        {"generation_kwargs": '{"min_tokens": 4}'},
    ],
)
def test_truncated_sampling_switches_the_correction_off_with_a_warning(values):
    with pytest.warns(UserWarning, match=f"{next(iter(values))}.*sampler correction is off"):
        made = config(use_vllm=True, **values)
    assert made.vllm_importance_sampling_correction is False
    assert made.sampling().logprobs is False


def test_stopping_early_is_no_other_distribution():
    made = config(use_vllm=True, generation_kwargs={"stop": ["</answer>"], "include_stop_str_in_output": True})
    assert made.vllm_importance_sampling_correction is True
    assert made.sampling().logprobs is True


def test_evaluating_at_another_temperature_is_not_corrected():
    """The trainer scores at its own temperature; the engine's log-probabilities would be at another one."""
    made = config(use_vllm=True, temperature=1.0, eval_temperature=0.5)
    assert made.sampling(evaluation=True).logprobs is False
    assert config(use_vllm=True, temperature=0.5, eval_temperature=0.5).sampling(evaluation=True).logprobs is True


def test_one_process_does_not_spread_over_several_devices(monkeypatch):
    monkeypatch.setattr(GRPOConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"2 devices in one process.*accelerate launch"):
        config()


def test_processes_that_would_train_apart_are_refused(monkeypatch):
    """torchrun on a CPU: without use_cpu, transformers joins none of them."""
    made = config()  # before, as it would look for the other process
    monkeypatch.setenv("WORLD_SIZE", "2")
    made._check_values()  # a cluster may set it for other reasons
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"2 processes were started.*use_cpu=True"):
        made._check_values()
    monkeypatch.setattr(GRPOConfig, "world_size", 2)
    made._check_values()


def test_greedy_evaluation():
    made = config(use_vllm=True, eval_temperature=0.0, top_k=0)
    assert made.sampling(evaluation=True).temperature == 0
    assert made.sampling(evaluation=True).logprobs is False
    assert made.sampling().temperature == 1.0
    assert made.sampling().logprobs is True


def test_dictionaries_may_be_json():
    made = config(vllm_engine_kwargs='{"max_num_batched_tokens": 512}')
    assert made.vllm_engine_kwargs == {"max_num_batched_tokens": 512}


@pytest.mark.parametrize(("given", "padded"), [("auto", None), (None, None), ("none", None), ("64", 64), (8, 8)])
def test_padding_may_be_given_in_words(given, padded):
    assert config(pad_to_multiple_of=given).pad_to_multiple_of == padded


def test_padding_must_be_a_size():
    with pytest.raises(ValueError, match="pad_to_multiple_of=-1"):
        config(pad_to_multiple_of="some")


def test_the_older_name_of_the_cap():
    with pytest.warns(FutureWarning, match="clip_max"):
        assert config(vllm_importance_sampling_cap=2.0).vllm_importance_sampling_clip_max == 2.0


def test_every_field_of_the_peer_has_its_default():
    """Names and defaults that scripts written for TRL 1.16's GRPOConfig rely on."""
    made = config()
    defaults = {
        "router_aux_loss_coef": None, "disable_dropout": False, "cast_lm_head_to_fp32": False,
        "num_generations_eval": None, "ds3_gather_for_generation": True, "shuffle_dataset": True, "top_p": 1.0,
        "top_k": 0, "min_p": None, "generation_kwargs": None, "chat_template_kwargs": None, "repetition_penalty": 1.0,
        "cache_implementation": None, "vllm_model_impl": "vllm", "vllm_enable_sleep_mode": False,
        "vllm_structured_outputs_regex": None, "vllm_server_base_url": None, "vllm_server_host": "0.0.0.0",
        "vllm_server_port": 8000, "vllm_server_timeout": 240.0, "vllm_group_port": 51216,
        "vllm_max_model_length": None, "vllm_tensor_parallel_size": 1, "num_iterations": 1, "delta": None,
        "epsilon_high": None, "sapo_temperature_neg": 1.05, "sapo_temperature_pos": 1.0, "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0, "importance_sampling_level": "token",
        "reward_weights": None, "multi_objective_aggregation": "sum_then_normalize", "scale_rewards": "group",
        "mask_truncated_completions": False, "sync_ref_model": False, "ref_model_mixup_alpha": 0.6,
        "ref_model_sync_steps": 512, "top_entropy_quantile": 1.0, "entropy_coef": 0.0, "use_adaptive_entropy": False,
        "entropy_coef_min": 0.0, "entropy_coef_max": 1.0, "entropy_coef_delta": 0.005, "entropy_target": 0.2,
        "max_tool_calling_iterations": None, "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_clip_min": None, "off_policy_mask_threshold": None, "use_bias_correction_kl": True,
        "log_completions": False, "log_multimodal": True, "num_completions_to_print": None,
        "log_unique_prompts": False, "log_completions_hub_repo": None, "logging_steps": 10,
        "use_transformers_continuous_batching": False, "use_transformers_paged": False,
    }  # fmt: skip
    assert {name: getattr(made, name) for name in defaults} == defaults


def test_the_older_name_of_continuous_batching():
    with pytest.warns(FutureWarning, match="use_transformers_continuous_batching"):
        assert config(use_transformers_paged=True).use_transformers_continuous_batching is True
