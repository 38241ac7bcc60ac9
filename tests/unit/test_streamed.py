"""Row-wise reward functions on completions in any order: the same rewards, columns and errors as in one call."""

from __future__ import annotations

import functools
import threading

import pytest

from slipstream import rewards
from slipstream.generation.engine import Request, Sampling
from slipstream.records import Completion, Prompt, Rollout
from slipstream.rewards import rowwise
from slipstream.rollouts.rewards import RewardRunner, _is_rowwise
from slipstream.serving.client import VLLMClient

PROMPTS = [Prompt([i], {"prompt": f"p{i}", "solution": i} | ({"hint": "h"} if i == 0 else {}), i) for i in range(3)]
COUNTS = [2, 1, 2]
IDS = [[[1], [2, 2]], [[3, 3, 3]], [[4], [5, 5]]]
ROLLOUTS = [
    Rollout(prompt, Completion(ids, None, 0, "stop"), f"{prompt.index}{ids}", False)
    for prompt, group in zip(PROMPTS, IDS, strict=True)
    for ids in group
]


def render(prompts, completion_ids):
    return [f"{prompt.index}{ids}" for prompt, ids in zip(prompts, completion_ids, strict=True)]


def make(calls):
    @rowwise
    def tokens(prompts, completions, completion_ids, solution, hint, trainer_state, log_extra, **_):
        calls.append((prompts, completions, completion_ids, solution, hint, trainer_state))
        log_extra("double", [2 * len(ids) for ids in completion_ids])
        if len(completion_ids) > 1:
            log_extra("several", completions)
        return [len(ids) for ids in completion_ids]

    return tokens


def score(runner, order, streamed_too=True):
    """Rewards and columns, with completions that end in `order`; None: all in one call."""
    extra = {}
    with runner.streamed(render, "state") as streamed:
        if order is not None:
            finished = streamed.begin(PROMPTS, COUNTS)
            for index in order:
                finished(index, IDS[index])
                for turn in streamed._attempt.turns:
                    turn.result(60)
        runner.score(ROLLOUTS, "state", lambda c, v: extra.update({c: list(v)}), streamed=streamed)
    return [r.rewards for r in ROLLOUTS], extra


def test_the_same_as_in_one_call():
    whole, parts = [], []
    expected = score(RewardRunner([make(whole)], [None]), None)
    found = score(RewardRunner([make(parts)], [None]), (2, 0, 1))
    assert found[0] == expected[0]
    assert found[1]["double"] == expected[1]["double"]
    # A column that is not given for all rows has none for the others.
    assert found[1]["several"] == ["0[1]", "0[2, 2]", None, "2[4]", "2[5, 5]"]
    assert [call[3] for call in parts] == [[2, 2], [0, 0], [1]]
    assert len(whole) == 1
    rows = sorted(row for call in parts for row in zip(*map(tuple, call[:4]), call[4], strict=True))
    assert rows == sorted(zip(*map(tuple, whole[0][:4]), whole[0][4], strict=True))
    assert {call[5] for call in parts} == {"state"}


def test_what_ends_while_a_function_runs_is_given_to_it_together():
    calls, going, go = [], threading.Event(), threading.Event()

    @rowwise
    def slow(completion_ids, **_):
        calls.append(len(completion_ids))
        going.set()
        assert go.wait(60)
        return [0.0] * len(completion_ids)

    runner = RewardRunner([slow], [None])
    with runner.streamed(render) as streamed:
        finished = streamed.begin(PROMPTS, COUNTS)
        finished(1, IDS[1])
        assert going.wait(60)
        finished(0, IDS[0])
        finished(2, IDS[2])
        go.set()
        runner.score(ROLLOUTS, streamed=streamed)
    assert calls == [1, 4]


def test_an_attempt_that_failed_leaves_nothing():
    calls = []
    runner = RewardRunner([make(calls)], [None])
    with runner.streamed(render) as streamed:
        streamed.begin(PROMPTS, COUNTS)(0, IDS[2])
        finished = streamed.begin(PROMPTS, COUNTS)
        for index in range(3):
            finished(index, IDS[index])
        runner.score(ROLLOUTS, streamed=streamed)
    assert [r.rewards for r in ROLLOUTS] == [[1.0], [2.0], [3.0], [1.0], [2.0]]


def test_what_the_engine_does_not_tell_is_scored_in_one_call():
    calls = []
    runner = RewardRunner([make(calls)], [None])
    rewarded, _ = score(runner, (1,))
    assert rewarded == [[1.0], [2.0], [3.0], [1.0], [2.0]]
    assert [len(call[0]) for call in calls] == [1, 5]


def test_errors_come_up_in_the_functions_turn():
    order = []

    @rowwise
    def broken(completion_ids, **_):
        raise LookupError(f"no reward for {completion_ids}")

    def first(completions, **_):
        order.append("first")
        return [0.0] * len(completions)

    with pytest.raises(LookupError, match=r"no reward for \[\[1\], \[2, 2\]\]"):
        score(RewardRunner([first, broken], [None, None]), (2, 0, 1))
    assert order == ["first"]
    for function, message in (
        (lambda **_: [1.0] * 9, "returned 9 values for 2 completions"),
        (
            lambda completions, **_: [float("nan")] * len(completions),
            "returned nan for completion 0: it must be a finite number",
        ),
        (lambda log_extra, **_: log_extra("x", [1] * 9), "given 9 values for 2 completions"),
        (lambda log_metric, **_: log_metric("x", 1.0), r"log_metric\('x', \.\.\.\) in a row-wise reward function"),
    ):
        function.__name__ = "odd"
        with pytest.raises(ValueError, match=message):
            score(RewardRunner([rowwise(function)], [None]), (1, 0, 2))
    with pytest.raises(ValueError, match="in a row-wise reward function"):
        score(RewardRunner([rowwise(function)], [None]), None)
    assert not [t for t in threading.enumerate() if t.name.startswith("rewards")]


def test_what_is_row_wise():
    function = make([])

    @functools.wraps(function)
    def whole_batch(**columns):
        return function(**columns)

    @rowwise
    async def later(**_):
        return []

    for one in (function, functools.partial(function, x=1), rewards.accuracy_reward, rewards.think_format_reward,
                rewards.get_cosine_scaled_reward(9), rewards.get_repetition_penalty_reward(),
                rewards.get_soft_overlong_punishment(9, 1), rewards.reasoning_accuracy_reward):  # fmt: skip
        assert _is_rowwise(one)
    for one in (whole_batch, later, len):
        assert not _is_rowwise(one)
    with RewardRunner([whole_batch, later], [None, None]).streamed(render) as streamed:
        assert streamed is None


def test_a_server_tells_of_a_prompt_when_its_last_completion_is_there(monkeypatch):
    order = [(1, 0), (0, 1), (0, 0), (2, 0), (2, 1)]
    told = []

    def stream(self, *_):
        for number, (prompt, sample) in enumerate(order):
            told.append(number)
            yield prompt, sample, Completion(IDS[prompt][sample], None, 0, "stop")

    monkeypatch.setattr(VLLMClient, "stream", stream)
    requests = [Request([1], n) for n in COUNTS]
    client = object.__new__(VLLMClient)
    client.sample(requests, Sampling(4), on_finished=lambda index, ids: told.append((index, ids)))
    assert told == [0, (1, IDS[1]), 1, 2, (0, IDS[0]), 3, 4, (2, IDS[2])]
