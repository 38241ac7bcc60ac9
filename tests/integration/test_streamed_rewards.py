"""Rewards of completions that are finished while vLLM samples others: shown by what waits for what, not by time."""

from __future__ import annotations

import json
import threading

import pytest
import resumable

from slipstream.generation.engine import Request, Sampling
from slipstream.rewards import rowwise
from slipstream.rollouts.rewards import RewardRunner

WANTED = [(i, 0, 4) for i in range(4)]


@pytest.fixture(scope="module")
def trainer(tiny_model, tmp_path_factory):
    # Four sequences at a time: a prompt's completions end before the next one's begin.
    made = resumable.make(
        str(tiny_model), tmp_path_factory.mktemp("run"), use_vllm=True, max_steps=2, save_strategy="no", beta=0.1,
        per_device_train_batch_size=4,
    )  # fmt: skip
    yield made
    made.close()


def digits(completions, completion_ids, log_extra, **_):
    log_extra("tokens", [len(ids) for ids in completion_ids])
    return [sum(c.isdigit() for c in m[0]["content"]) / 8 + len(ids) for m, ids in zip(completions, completion_ids)]  # noqa: B905


def collect(trainer, *functions):
    """Ids, rewards, advantages and logged columns of some prompts' completions, and the metrics."""
    trainer.rewards = RewardRunner(functions, [None] * len(functions))
    rollouts, metrics = trainer._collect(trainer.train_dataset, WANTED, ("seed",), 4)
    return [(r.completion.ids, r.text, r.rewards, r.advantage) for r in rollouts], metrics, dict(trainer._extra)


def test_a_reward_is_there_before_generation_ends(trainer, monkeypatch):
    rewarded, told = threading.Event(), []
    engine = type(trainer.engine._llm.llm_engine)
    step = engine.step

    @rowwise
    def first_of_all(completions, **_):
        told.append(len(completions))
        rewarded.set()
        return [0.0] * len(completions)

    unfinished = []

    def wait_for_the_reward(self):
        outputs = step(self)
        if unfinished and not rewarded.is_set():
            # It runs now, between two steps of the engine, or never.
            assert rewarded.wait(60)
        if any(output.finished for output in outputs):
            unfinished.append(self.has_unfinished_requests())
        return outputs

    monkeypatch.setattr(engine, "step", wait_for_the_reward)
    collect(trainer, first_of_all)
    assert unfinished == [True, True, True, False]
    assert told[0] < 16
    assert sum(told) == 16


def test_the_same_rewards_metrics_and_columns_as_in_one_call(trainer):
    calls = []

    def whole(**given):
        calls.append(len(given["completions"]))
        return digits(**given)

    whole.__name__ = "digits"

    @rowwise
    def parts(**given):
        calls.append(len(given["completions"]))
        return digits(**given)

    parts.__name__ = "digits"
    expected = collect(trainer, whole)
    assert calls == [16]
    del calls[:]
    assert collect(trainer, parts) == expected
    assert sum(calls) == 16
    assert all(count % 4 == 0 for count in calls)
    assert list(expected[2]) == ["tokens"]


def test_an_error_of_a_reward_comes_up_and_the_engine_goes_on(trainer):
    @rowwise
    def broken(**_):
        raise LookupError("no reward")

    with pytest.raises(LookupError, match="no reward"):
        collect(trainer, broken)
    assert not [t for t in threading.enumerate() if t.name.startswith("rewards")]
    assert len(collect(trainer, digits)[0]) == 16


def test_the_engine_tells_every_request_once_and_its_own_completions(trainer):
    prompts = [trainer.renderer.render(trainer.train_dataset[i], i).ids for i in range(3)]
    for temperature in (1.0, 0.0):
        told = {}
        requests = [Request(prompt, n=i + 1, seed=7) for i, prompt in enumerate(prompts)]
        answers = trainer.engine.generate(requests, Sampling(6, temperature), told.__setitem__)
        assert [told[i] for i in range(3)] == [[c.ids for c in group] for group in answers]
    assert "step" not in vars(trainer.engine._llm.llm_engine)


def test_a_run_learns_the_same(tiny_model, trainer):
    histories = []
    for mark in (lambda function: function, rowwise):
        trainer.rewards = RewardRunner([mark(resumable.digits)], [None])
        trainer.model.load_state_dict(type(trainer.model).from_pretrained(tiny_model).state_dict())
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.train()
        histories.append([
            {k: v for k, v in entry.items() if "time" not in k and "second" not in k and "runtime" not in k}
            for entry in trainer.state.log_history
        ])  # fmt: skip
    assert resumable.digits.rowwise
    del resumable.digits.rowwise
    assert json.dumps(histories[0]) == json.dumps(histories[1])
    assert any("loss" in entry for entry in histories[0])
