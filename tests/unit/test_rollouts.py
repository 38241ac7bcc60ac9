"""The plan of prompts, the rendering of prompts, and the running of reward functions."""

from __future__ import annotations

import asyncio
import functools
import threading

import pytest
import tiny
import torch

from slipstream.records import Completion, Prompt, Rollout
from slipstream.rewards import rowwise
from slipstream.rollouts.prompts import PromptRenderer
from slipstream.rollouts.rewards import RewardRunner
from slipstream.rollouts.sampler import PromptSampler, Slot, prompt_seed


def rollouts(n=3, prompt="2+2", **columns):
    prompts = [Prompt([1], {"prompt": prompt, **{k: v[i] for k, v in columns.items()}}, i) for i in range(n)]
    return [Rollout(p, Completion([5, i], None, 0, "stop"), f"answer {i}", False) for i, p in enumerate(prompts)]


class TestSampler:
    def test_every_epoch_visits_whole_batches_in_a_new_order(self):
        sampler = PromptSampler(10, prompts_per_batch=3, slots_per_batch=4, seed=7)
        assert len(sampler) == 3 * 4 == len(list(sampler))
        epochs = [[p for b in range(3) for p in sampler.prompts(e, b)] for e in range(3)]
        assert all(len(set(e)) == 9 for e in epochs)
        assert epochs[0] != epochs[1] != epochs[2]

    def test_the_plan_follows_from_the_seed(self):
        one, two = (PromptSampler(50, 8, 1, seed=3) for _ in range(2))
        assert one.prompts(4, 2) == two.prompts(4, 2)
        assert one.prompts(4, 2) != PromptSampler(50, 8, 1, seed=4).prompts(4, 2)

    def test_without_shuffling_it_keeps_the_order(self):
        sampler = PromptSampler(6, 2, 1, seed=0, shuffle=False)
        assert [sampler.prompts(5, b) for b in range(3)] == [[0, 1], [2, 3], [4, 5]]

    def test_slots_name_their_epoch(self):
        sampler = PromptSampler(4, 2, 2, seed=0)
        sampler.set_epoch(3)
        assert [s for [s] in sampler] == [Slot(3, 0, 0), Slot(3, 0, 1), Slot(3, 1, 0), Slot(3, 1, 1)]

    def test_too_small_a_dataset_would_train_on_nothing(self):
        with pytest.raises(ValueError, match="5 rows, but one generation batch needs 8 different prompts"):
            PromptSampler(5, 8, 1, seed=0)

    def test_seeds_differ_in_every_part_and_fit_64_bits(self):
        seeds = {prompt_seed(s, m, e, b, r) for s in (0, 1) for m in ("train", "eval") for e in (0, 1) for b in (0, 1)
                 for r in (0, 1)}  # fmt: skip
        assert len(seeds) == 32
        assert max(seeds) + 10**6 < 2**63
        assert prompt_seed(0, "train", 1, 2, 3) == prompt_seed(0, "train", 1, 2, 3)


class TestPrompts:
    tokenizer = tiny.tokenizer()

    def test_a_string_is_tokenized_as_it_is(self):
        prompt = PromptRenderer(self.tokenizer).render({"prompt": "1+1="}, 4)
        assert self.tokenizer.decode(prompt.ids) == "1+1="
        assert prompt.index == 4

    def test_messages_go_through_the_template_and_ask_for_an_answer(self):
        prompt = PromptRenderer(self.tokenizer).render({"prompt": [{"role": "user", "content": "1+1"}]}, 0)
        assert self.tokenizer.decode(prompt.ids) == "<user>1+1<end><assistant>"

    def test_an_assistants_message_is_continued(self):
        messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "The sum"}]
        prompt = PromptRenderer(self.tokenizer).render({"prompt": messages}, 0)
        assert self.tokenizer.decode(prompt.ids) == "<user>1+1<end><assistant>The sum"

    @pytest.mark.parametrize("bad", [None, 3, {"role": "user"}, ["text"], []])
    def test_other_forms_are_named(self, bad):
        with pytest.raises(ValueError, match="row 9 of the dataset: prompt="):
            PromptRenderer(self.tokenizer).render({"prompt": bad}, 9)

    def test_an_empty_prompt_is_an_error(self):
        with pytest.raises(ValueError, match="no tokens"):
            PromptRenderer(self.tokenizer).render({"prompt": ""}, 0)

    def test_messages_without_a_template_are_an_error(self):
        bare = tiny.tokenizer()
        bare.chat_template = None
        with pytest.raises(ValueError, match="no chat template"):
            PromptRenderer(bare).render({"prompt": [{"role": "user", "content": "x"}]}, 0)

    def test_completions_take_the_form_of_their_prompt(self):
        ids = [*self.tokenizer("42")["input_ids"], self.tokenizer.eos_token_id]
        chat = Prompt([1], {"prompt": [{"role": "user", "content": "x"}]}, 0)
        plain = Prompt([1], {"prompt": "x"}, 0)
        texts = PromptRenderer(self.tokenizer).completions([chat, plain], [ids, ids])
        assert texts == [[{"role": "assistant", "content": "42"}], "42"]


class TestRewards:
    def test_columns_reach_every_function_and_weights_stay_outside(self):
        seen = {}

        def length(completions, **kwargs):
            seen.update(kwargs)
            return [len(c) for c in completions]

        async def matches(completion_ids, solution, **kwargs):
            await asyncio.sleep(0)
            return [float(ids[-1] == int(s)) for ids, s in zip(completion_ids, solution, strict=True)]

        rows = rollouts(solution=["0", "0", "2"])
        RewardRunner([length, matches], [None, None]).score(rows, trainer_state="state")
        assert [r.rewards for r in rows] == [[8.0, 1.0], [8.0, 0.0], [8.0, 1.0]]
        assert seen["solution"] == ["0", "0", "2"]
        assert seen["prompts"] == ["2+2"] * 3
        assert seen["trainer_state"] == "state"

    def test_none_means_not_scorable(self):
        rows = rollouts(2)
        RewardRunner([lambda completions, **_: [None, torch.tensor(1.5)]], [None]).score(rows)
        assert [r.rewards for r in rows] == [[None], [1.5]]

    def test_completions_that_nobody_scores_are_said_once(self, caplog):
        def first(completions, **_):
            return [None, None]

        def second(completions, **_):
            return [None, 1]

        runner = RewardRunner([first, second], [None, None])
        runner.score(rollouts(2))
        [record] = caplog.records
        assert "1 of 2 completions were scored None by every reward function (first, second)" in record.getMessage()
        runner.score(rollouts(2))
        assert len(caplog.records) == 1

    def test_async_functions_run_side_by_side(self):
        barrier = asyncio.Barrier(2)

        async def first(completions, **_):
            await barrier.wait()
            return [1.0] * len(completions)

        async def second(completions, **_):
            await barrier.wait()
            return [2.0] * len(completions)

        rows = rollouts(1)
        RewardRunner([first, second], [None, None], timeout=60).score(rows)
        assert rows[0].rewards == [1.0, 2.0]

    def test_async_functions_work_inside_a_running_loop(self):
        async def one(completions, **_):
            return [1.0] * len(completions)

        async def notebook():
            rows = rollouts(1)
            RewardRunner([one], [None]).score(rows)
            return rows[0].rewards

        assert asyncio.run(notebook()) == [1.0]

    def test_what_async_functions_keep_serves_every_batch(self):
        slots = asyncio.Semaphore(
            1
        )  # belongs to the loop in which it was first waited for, as a client's connections do

        async def ask():
            async with slots:
                await asyncio.sleep(0)
            return 1.0

        async def asks_a_server(completions, **_):
            return await asyncio.gather(*(ask() for _ in completions))

        runner, rows = RewardRunner([asks_a_server], [None]), rollouts()
        for _ in range(2):
            runner.score(rows)
            assert [r.rewards for r in rows] == [[1.0]] * 3

    def test_when_an_async_function_fails_no_other_goes_on_in_the_next_batch(self):
        fails, ends = True, []

        async def first(completions, **_):
            if fails:
                raise RuntimeError("the judge is ill")
            await asyncio.sleep(0)
            return [0.0] * len(completions)

        async def second(completions, **_):
            try:
                await asyncio.sleep(60 if fails else 0)
            finally:
                ends.append(fails)
            return [0.0] * len(completions)

        runner = RewardRunner([first, second], [None, None])
        with pytest.raises(RuntimeError, match="the judge is ill"):
            runner.score(rollouts())
        assert ends == [True]
        fails = False
        runner.score(rollouts())
        assert ends == [True, False]

    @pytest.mark.parametrize("kind", ["plain", "async", "row-wise"])
    def test_a_function_may_change_what_it_is_given(self, kind):
        def changes(prompts, completions, completion_ids, goal, **_):
            lengths = []
            for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True):
                prompt.extend(completion)
                completion[0]["content"] += "!"
                ids.pop()
                lengths.append(len(prompt))
            goal.clear()
            return lengths

        async def changes_later(**given):
            return changes(**given)

        def reads(prompts, completions, completion_ids, goal, **_):
            seen.append((prompts, completions, completion_ids, goal))
            return [0.0] * len(prompts)

        async def reads_later(**given):
            return reads(**given)

        seen = []
        functions = [changes_later, reads_later] if kind == "async" else [changes, reads]
        runner = RewardRunner([rowwise(f) if kind == "row-wise" else f for f in functions], [None, None])
        question, answer = {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}
        prompt = Prompt([1], {"prompt": [dict(question)], "goal": 4}, 0)
        rows = [Rollout(prompt, Completion([5, 2], [-1.0, -1.0], 0, "stop"), [dict(answer)], False) for _ in range(2)]
        with runner.streamed(lambda prompts, ids: [[dict(answer)] for _ in ids]) as streamed:
            if streamed is not None:
                streamed.begin([prompt], [2])(0, [r.completion.ids for r in rows])
            runner.score(rows, streamed=streamed)
        assert [r.rewards for r in rows] == [[2.0, 0.0]] * 2
        assert seen == [([[question]] * 2, [[answer]] * 2, [[5, 2]] * 2, [4, 4])]
        assert prompt.row == {"prompt": [question], "goal": 4}
        assert [(r.text, r.completion.ids) for r in rows] == [([answer], [5, 2])] * 2

    def test_a_slow_async_function_ends_at_the_deadline(self):
        async def never(completions, **_):
            await asyncio.Event().wait()

        with pytest.raises(TimeoutError, match=r"never.*reward_timeout=0.05"):
            RewardRunner([never], [None], timeout=0.05).score(rollouts(1))
        assert not [t for t in threading.enumerate() if t.name.startswith("rewards")]

    def test_a_functions_own_timeout_is_not_taken_for_ours(self):
        async def asks_a_server(completions, **_):
            raise TimeoutError("the judge did not answer")

        with pytest.raises(TimeoutError, match="the judge did not answer"):
            RewardRunner([asks_a_server], [None]).score(rollouts(1))

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            ([1.0], "'bad' returned 1 values for 3 completions"),
            ("yes", "'bad' returned str"),
            (1.0, "'bad' returned float"),
            ([1.0, "x", 0.0], "'bad' returned 'x' for completion 1"),
            ([1.0, 0.0, float("nan")], "'bad' returned nan for completion 2"),
            ([float("inf"), 0.0, 0.0], "'bad' returned inf for completion 0"),
        ],
    )
    def test_wrong_returns_name_the_function(self, returned, message):
        def bad(completions, **_):
            return returned

        with pytest.raises(ValueError, match=message):
            RewardRunner([bad], [None]).score(rollouts())

    def test_two_functions_of_one_name_would_mix_their_metrics(self):
        with pytest.raises(ValueError, match="same name"):
            RewardRunner([len, len], [None, None])

    def test_names_of_partials(self):
        assert RewardRunner([functools.partial(max, 3)], [None]).names == ["max"]

    def test_functions_can_log(self):
        def logs(completions, log_extra, log_metric, **_):
            log_extra("length", [len(c) for c in completions])
            log_metric("share", 0.5)
            return [0.0] * len(completions)

        extra, metrics = {}, {}
        RewardRunner([logs], [None]).score(rollouts(2), None, extra.__setitem__, metrics.__setitem__)
        assert extra == {"length": [8, 8]}
        assert metrics == {"share": 0.5}

    def test_something_else_is_not_a_reward(self):
        with pytest.raises(TypeError, match="reward_funcs holds 3"):
            RewardRunner([3], [None])
