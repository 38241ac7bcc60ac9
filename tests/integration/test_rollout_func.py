"""Training on rollouts that a function of the user's samples."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from slipstream import GRPOConfig, GRPOTrainer
from slipstream.generation.engine import Request

ROWS = [
    {"prompt": [{"role": "user", "content": f"{a}+{b}=?"}], "solution": str(a + b)} for a in range(4) for b in (0, 1)
]


def ask(trainer, prompts, turns=1):
    """Sample from the trainer's engine, one completion a prompt; a second turn begins with an observation."""
    tokenizer = trainer.processing_class
    ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]
    sampling = trainer.args.sampling()
    seed = 1000 * trainer.state.global_step
    made = {"prompt_ids": ids, "completion_ids": [], "logprobs": None, "env_mask": [], "turns": []}
    for i, prompt in enumerate(ids):
        completion, mask = [], []
        for turn in range(turns):
            [[answer]] = trainer.engine.generate([Request(prompt + completion, 1, seed + 10 * i + turn)], sampling)
            completion, mask = completion + answer.ids, mask + [1] * len(answer.ids)
            if turn < turns - 1:
                observed = tokenizer("seen")["input_ids"]
                completion, mask = completion + observed, mask + [0] * len(observed)
        made["completion_ids"].append(completion)
        made["env_mask"].append(mask)
        made["turns"].append(turns)
    return made


def make(model, folder, rollout_func, reward, **values):
    settings = {
        "max_completion_length": 4, "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2,
        "logging_steps": 1, "learning_rate": 1e-2, "report_to": [], "gradient_checkpointing": False,
        "save_strategy": "no", "disable_tqdm": True, "html_report": False,
    } | values  # fmt: skip
    args = GRPOConfig(output_dir=str(folder), **settings)
    evaluate = Dataset.from_list(ROWS[:2])
    return GRPOTrainer(model, reward, args, Dataset.from_list(ROWS), evaluate, rollout_func=rollout_func)


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_a_function_of_two_turns_trains(tiny_model, tmp_path):
    seen = []

    def rollout_func(prompts, trainer):
        seen.append((len(prompts), prompts[0] == prompts[3], trainer.engine.version, trainer.state.global_step))
        return ask(trainer, prompts, turns=2)

    def reward(completions, completion_ids, turns, solution, **_):
        assert turns == [2] * len(completions)
        assert all("seen" in c[0]["content"] for c in completions)
        assert len(solution) == len(completion_ids)
        return [float(sum(ids)) for ids in completion_ids]

    trainer = make(tiny_model, tmp_path, rollout_func, reward, eval_strategy="steps", eval_steps=2)
    before = weights(trainer)
    trainer.train()
    trainer.close()
    assert seen == [(8, True, 0, 0), (8, True, 1, 1), (8, True, 2, 2)], "two steps and an evaluation, weights first"
    assert not torch.equal(before, weights(trainer))
    # Two turns of at most four tokens; the four of the observation do not count.
    assert max(history(trainer, "completions/max_length")) <= 8
    assert history(trainer, "staleness/max") == [0.0, 0.0]
    assert history(trainer, "eval_reward")


def test_tokens_of_the_environment_are_not_learned(tiny_model, tmp_path):
    """Two runs that differ in what the mask leaves out alone, as the rewards do not look at it."""

    def fixed(tail, mask):
        def rollout_func(prompts, trainer):
            ids = [[10 + i, 20, 30 + i] for i in range(len(prompts))]
            return {
                "prompt_ids": [[5, 6, 7]] * len(prompts),
                "completion_ids": [row + tail for row in ids],
                "logprobs": None,
                **({"env_mask": [[1, 1, 1, *mask] for _ in ids]} if mask is not None else {}),
            }

        return rollout_func

    def reward(completion_ids, **_):
        return [float(ids[0]) for ids in completion_ids]

    made = {}
    cases = {
        "short": ([], None),
        "masked": ([40, 41], [0, 0]),
        "other": ([50, 51], [0, 0]),
        "learned": ([40, 41], None),
    }
    for name, (tail, mask) in cases.items():
        values = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "top_entropy_quantile": 0.5}
        trainer = make(tiny_model, tmp_path / name, fixed(tail, mask), reward, **values)
        trainer.train()
        trainer.close()
        made[name] = weights(trainer)
        lengths = {name: history(trainer, "completions/max_length") for name in cases}
        assert lengths[name] == [5.0 if name == "learned" else 3.0]
    torch.testing.assert_close(made["masked"], made["short"], atol=1e-6, rtol=0)
    torch.testing.assert_close(made["masked"], made["other"], atol=1e-6, rtol=0)
    assert (made["learned"] - made["short"]).abs().max() > 1e-4


def test_its_log_probabilities_correct_the_sampler(tiny_model, tmp_path):
    def rollout_func(prompts, trainer):
        ids = [[10 + i] for i in range(len(prompts))]
        return {"prompt_ids": [[5]] * len(prompts), "completion_ids": ids, "logprobs": [[-2.0]] * len(prompts)}

    trainer = make(tiny_model, tmp_path, rollout_func, lambda completion_ids, **_: [i[0] for i in completion_ids])
    trainer.train()
    trainer.close()
    assert history(trainer, "sampling/sampling_logp_difference/max")[0] > 0


@pytest.mark.parametrize("mode", ["sequence_mask", "token_mask"])
def test_vespo_takes_its_log_probabilities_token_by_token(mode, tiny_model, tmp_path):
    def rollout_func(prompts, trainer):
        made = ask(trainer, prompts)
        return made | {"logprobs": [[-2.0] * len(ids) for ids in made["completion_ids"]]}

    trainer = make(
        tiny_model, tmp_path, rollout_func, lambda completion_ids, **_: [i[0] for i in completion_ids],
        loss_type="vespo", vllm_importance_sampling_mode=mode, max_steps=1,
    )  # fmt: skip
    if mode == "token_mask":
        trainer.train()
        assert history(trainer, "vespo/phi_seq_mean")
    else:
        with pytest.raises(ValueError, match="would count them twice"):
            trainer.train()
    trainer.close()


def test_a_run_stopped_within_a_batch_goes_on(tiny_model, tmp_path):
    def reward(completion_ids, **_):
        return [float(sum(ids)) for ids in completion_ids]

    def run(folder, resume=None, **values):
        trainer = make(
            tiny_model, folder, lambda prompts, trainer: ask(trainer, prompts, turns=2), reward, max_steps=4,
            steps_per_generation=2, save_strategy="steps", save_steps=1, **values,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        trainer.close()
        return trainer

    whole = run(tmp_path / "run")
    again = run(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-3"))
    assert torch.equal(weights(whole), weights(again))


def test_errors_reach_the_caller(tiny_model, tmp_path):
    trainer = make(tiny_model, tmp_path, lambda prompts, trainer: {"prompt_ids": []}, lambda **_: [])
    with pytest.raises(ValueError, match="rollout_func returned no 'completion_ids', 'logprobs'"):
        trainer.train()
    trainer.close()


def test_it_must_be_a_function(tmp_path):
    with pytest.raises(TypeError, match="rollout_func='f' is not a function"):
        make("no/such-model-anywhere", tmp_path, "f", lambda **_: [])
