"""Rollouts in which the model calls tools, with real engines and a model that knows how to."""

from __future__ import annotations

import asyncio
import shutil
from importlib.util import find_spec

import calling
import pytest
import torch
from calling import CONVERSATIONS, ROWS, add, sampled
from calling import trainer as make
from datasets import Dataset

from slipstream import GRPOConfig, GRPOTrainer
from slipstream.trainers import loading
from slipstream.trainers.vision import refuse_beside_tools

VLLM = find_spec("vllm") is not None
# Tokens of a turn that calls, with its end, and of what stands between turns.
CALL = len('<{"name": "add", "arguments": {"a": 1, "b": 2}}><')
BETWEEN = len("\n<3<\n<")


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_reward_functions_see_messages_and_metrics_count_calls(calling_model, tmp_path):
    seen = []

    def reward(prompts, completions, completion_ids, calls, **_):
        seen.extend(zip(prompts, completions, calls, strict=True))
        return [float(len(c)) for c in completions]

    trainer = make(calling_model, tmp_path, reward, eval_strategy="steps", eval_steps=1, temperature=0.01)
    trainer.train()
    trainer.close()
    for prompt, completion, calls in seen[:6]:
        assert completion == CONVERSATIONS[prompt[0]["content"]][1]
        assert sum(m["role"] == "tool" for m in completion) == calls
    assert history(trainer, "tools/call_frequency") == [1.0]
    assert history(trainer, "tools/failure_frequency") == [0.0]
    assert history(trainer, "eval_tools/failure_frequency") == [0.0]
    assert history(trainer, "eval_reward")
    text = (tmp_path / "completions.jsonl").read_text()
    assert r"→ add({\"a\": 1, \"b\": 2})\n← add: 3\nok" in text


def test_a_run_learns_to_call(calling_model, tmp_path):
    def reward(completions, **_):
        return [float(any(m["role"] == "tool" for m in c)) for c in completions]

    trainer = make(
        calling_model, tmp_path, reward, temperature=1.0, max_steps=12, learning_rate=3e-4,
        per_device_train_batch_size=24, num_generations=24, rows=[{"prompt": calling.EITHER[0][0]}],
    )  # fmt: skip
    trainer.train()
    trainer.close()
    calls = history(trainer, "tools/call_frequency")
    assert sum(calls[-3:]) / 3 > sum(calls[:2]) / 2 + 0.2, calls


class Shelf:
    """An environment with one tool, and a shelf of its own."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.added = None

    def reset(self, prompt, calls, **_):
        assert prompt[-1]["role"] == "user"
        prompt[-1]["content"] = "changed"  # its own
        self.added = []
        return "e" if prompt and calls == 1 else None

    def add(self, a: int, b: int) -> int:
        """Add two numbers, and keep them.

        Args:
            a: The first.
            b: The second.
        """
        self.added.append((a, b))
        return a + b

    def get_reward(self):
        return float(len(self.added))


def test_each_rollout_has_its_environment(calling_model, tmp_path, monkeypatch):
    monkeypatch.setattr(Shelf, "made", 0)
    seen = []

    def reward(prompts, completions, environments, calls, **_):
        seen.append((prompts, environments))
        assert len({id(e) for e in environments}) == len(environments)
        for completion, environment in zip(completions, environments, strict=True):
            assert len(environment.added) == sum(m["role"] == "tool" for m in completion)
        return [0.5] * len(prompts)

    rows = [
        {"prompt": CONVERSATIONS["two"][0], "calls": 2},
        {"prompt": [{"role": "user", "content": "on"}], "calls": 1},
    ]
    trainer = make(
        calling_model, tmp_path, reward, None, rows, Shelf, per_device_train_batch_size=4, max_steps=2,
        temperature=0.01, num_iterations=1,
    )  # fmt: skip
    trainer.train()
    trainer.close()
    assert Shelf.made == 4, "kept for later rollouts"
    for prompts, environments in seen:
        assert sorted(p[0]["content"] for p in prompts) == ["one", "one", "two", "two"], "what reset returned is added"
        assert sorted(len(e.added) for e in environments) in ([1, 1, 2, 2],) or environments is seen[0][1]
    assert history(trainer, "rewards/Shelf/mean") == [1.5, 1.5]
    assert history(trainer, "reward") == [2.0, 2.0]


def test_its_environments_can_be_all_that_rewards(calling_model, tmp_path):
    trainer = GRPOTrainer(
        str(calling_model), args=GRPOConfig(str(tmp_path), report_to=[], num_generations=4, max_completion_length=99),
        train_dataset=Dataset.from_list(ROWS), processing_class=calling.tokenizer(), environment_factory=Shelf,
    )  # fmt: skip
    assert trainer.rewards.names == ["Shelf"]
    trainer.close()


def test_async_tools_and_rewards_share_an_event_loop(calling_model, tmp_path):
    """A client that a tool has opened can be asked for the reward."""

    class Remote:
        def reset(self, **_):
            self.loop = None

        async def add(self, a: int, b: int) -> int:
            """Add two numbers.

            Args:
                a: The first.
                b: The second.
            """
            self.loop = asyncio.get_running_loop()
            return a + b

        async def get_reward(self):
            return float(self.loop is asyncio.get_running_loop())

    trainer = make(
        calling_model, tmp_path, None, None, ROWS[1:], Remote, per_device_train_batch_size=4, temperature=0.01
    )
    trainer.train()
    trainer.close()
    assert history(trainer, "rewards/Remote/mean") == [1.0]


class Silent:
    """An environment without a tool, that gives the prompt."""

    def reset(self, environment=None, **_):
        assert environment is None, "that is for the trainer"
        return "one"


def test_rows_choose_their_environments(calling_model, tmp_path):
    """The row for which there is no tool to call is told of none, and answers as it likes."""
    seen = []

    def reward(prompts, completions, environments, environment, **_):
        seen.extend(zip(environment, prompts, completions, map(type, environments), strict=True))
        return [1.0] * len(prompts)

    on = [{"role": "user", "content": "on"}]
    rows = [
        {"prompt": on, "calls": 1, "environment": "shelf"},
        {"prompt": [{"role": "user", "content": ""}], "calls": 0, "environment": "silent"},
    ]
    trainer = make(
        calling_model, tmp_path, reward, None, rows, {"shelf": Shelf, "silent": Silent}, temperature=0.01,
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    words = trainer.processing_class
    rollouts = trainer._generate(trainer.train_dataset, [(0, 0, 1), (1, 0, 1)], (0,), evaluation=False)
    trainer.close()
    assert ["<system>add;" in words.decode(r.prompt.ids) for r in rollouts] == [True, False]
    assert {(name, kind) for name, *_, kind in seen} == {("shelf", Shelf), ("silent", Silent)}
    assert all(prompt[0]["content"] == "one" for _, prompt, *_ in seen)
    assert all(c == CONVERSATIONS["one"][1] for name, _, c, _ in seen if name == "shelf")
    assert history(trainer, "rewards/Shelf/mean") == [1.0], "of its own rollouts"


def test_what_reset_returns_needs_a_message(calling_model, tmp_path):
    rows = [{"prompt": "one"}] * 3
    trainer = make(calling_model, tmp_path, None, None, rows, Silent)
    with pytest.raises(ValueError, match="prompt='one' is no list of messages"):
        trainer.train()
    trainer.close()


def test_environments_may_be_all_the_data(calling_model, tmp_path):
    trainer = GRPOTrainer(
        str(calling_model), args=GRPOConfig(
            str(tmp_path), report_to=[], num_generations=4, max_completion_length=99, per_device_train_batch_size=8,
            max_steps=2, logging_steps=1, save_strategy="no", html_report=False, disable_tqdm=True,
        ), processing_class=calling.tokenizer(), environment_factory=Asking,
    )  # fmt: skip
    trainer.train()
    trainer.close()
    assert len(trainer.train_dataset) == 2
    assert len(history(trainer, "reward")) == 2
    assert min(history(trainer, "tools/call_frequency")) > 0.5


class Asking(Shelf):
    def reset(self, **_):
        self.added = []
        return "one"


@pytest.mark.parametrize(
    ("values", "calls", "last"),
    [
        ({"max_tool_calling_iterations": 1}, 1, "call"),
        ({"max_tool_calling_iterations": 2}, 2, "ok"),
        ({"max_completion_length": 2 * CALL + 2 * BETWEEN + 3}, 2, "ok"),
        ({"max_completion_length": 2 * CALL + 2 * BETWEEN + 1}, 2, "o"),
        ({"max_completion_length": 2 * CALL + 2 * BETWEEN}, 2, "left out"),
        ({"max_completion_length": 2 * CALL + BETWEEN}, 2, "left out"),
        ({"max_completion_length": 2 * CALL + BETWEEN - 1}, 1, "cut"),
        ({"max_completion_length": CALL + BETWEEN}, 1, "left out"),
        ({"max_completion_length": CALL}, 1, "left out"),
        ({"max_completion_length": CALL - 1}, 0, "cut"),
    ],
)
def test_limits_end_a_rollout(calling_model, tmp_path, values, calls, last):
    ran = []

    def noted(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first.
            b: The second.
        """
        ran.append((a, b))
        return a + b

    noted.__name__ = "add"
    trainer = make(calling_model, tmp_path, tools=[noted], eval_temperature=0.0, **values)
    with trainer._engine_ready():
        [rollout] = sampled(trainer, [2])
    trainer.close()
    whole = CONVERSATIONS["two"][1]
    assert len(ran) == rollout.extra["tool_calls"] == calls
    assert len(rollout.completion.ids) <= trainer.args.max_completion_length
    assert rollout.extra["loss_mask"][-1] == 1.0, "it ends with the model's own"
    told = calls - (last == "left out")
    if last == "ok":
        assert rollout.text == whole
    elif last in ("call", "left out"):
        assert rollout.text == whole[: 2 * told + 1]
    else:
        text = rollout.text[-1].pop("content")
        assert rollout.text == [*whole[: 2 * told], {"role": "assistant"}]
        assert text == ("o" if last == "o" else '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>')
    assert rollout.truncated == (last in ("cut", "o"))


def test_the_context_is_never_exceeded(calling_model, tmp_path):
    """A prompt that its environment made longer leaves less room."""

    class Talker(Shelf):
        def reset(self, **_):
            self.added = []
            return "e" * 30

    prompt = len(calling.tokenizer().apply_chat_template(ROWS[2]["prompt"], tools=calling.schemas(),
                                                         add_generation_prompt=True, return_dict=False))  # fmt: skip
    trainer = make(
        calling_model, tmp_path, None, None, ROWS[2:], Talker, use_vllm=VLLM, vllm_max_model_length=prompt + 60,
        max_completion_length=60, per_device_train_batch_size=2,
    )  # fmt: skip
    with trainer._engine_ready():
        [rollout] = sampled(trainer, [0])
    assert len(rollout.prompt.ids) == prompt + 30
    assert len(rollout.completion.ids) <= (30 if VLLM else 60)
    Talker.reset = lambda self, **_: "e" * 60
    if VLLM:
        with pytest.raises(
            ValueError, match=r"row 0: the prompt has \d+ tokens, which leaves no room .* \d+\. Shorten"
        ):
            sampled(trainer, [0])
    trainer.close()


def test_a_run_stopped_within_a_batch_goes_on(calling_model, tmp_path):
    def run(resume=None):
        trainer = make(
            calling_model, tmp_path, None, None, ROWS * 2, Shelf, max_steps=4, steps_per_generation=2, save_steps=1,
            save_strategy="steps", temperature=1.0,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        trainer.close()
        return trainer

    whole = run()
    again = run(str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(whole), weights(again))
    for name in ("loss", "tools/call_frequency", "completions/mean_length"):
        assert history(whole, name) == history(again, name)


def test_images_do_not_go_with_tools():
    rows = [{"prompt": ROWS[0]["prompt"], "images": []}]
    refuse_beside_tools(ROWS, None, {"a": ROWS})
    for datasets in ([rows], [ROWS, {"a": ROWS, "b": rows}]):
        with pytest.raises(NotImplementedError, match="images in one run"):
            refuse_beside_tools(*datasets)


def test_images_in_messages_are_refused_too(calling_model, tmp_path):
    words = calling.tokenizer()
    words.chat_template = words.chat_template.replace("+ m['content'] + '<end>", "+ m['content'] | string + '<end>")
    blocks = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "one"}]
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": blocks}]}])
    args = GRPOConfig(str(tmp_path), report_to=[], max_steps=1, per_device_train_batch_size=8, max_completion_length=9)
    with pytest.raises(NotImplementedError, match="tools, or environments, and prompts with images in one run"):
        GRPOTrainer(str(calling_model), [len], args, rows, processing_class=words, tools=[add])


def test_images_of_an_evaluation_are_refused_too(calling_model, tmp_path):
    rows = Dataset.from_list([{"prompt": ROWS[0]["prompt"]}])
    args = GRPOConfig(str(tmp_path), report_to=[], max_steps=1, per_device_train_batch_size=8, max_completion_length=9)
    trainer = GRPOTrainer(str(calling_model), [len], args, rows, processing_class=calling.tokenizer(), tools=[add])
    with pytest.raises(NotImplementedError, match="tools, or environments, and prompts with images in one run"):
        trainer.evaluate(Dataset.from_list([{"prompt": ROWS[0]["prompt"], "images": []}]))
    trainer.close()


@pytest.mark.parametrize("kept", [True, False])
def test_what_ends_a_turn_is_known_before_the_model_is_loaded(kept, calling_model, tmp_path):
    folder = shutil.copytree(calling_model, tmp_path / "model")
    config = folder / "generation_config.json"
    config.write_text(config.read_text().replace('"eos_token_id": 1', '"eos_token_id": [1, 7]'))
    if not kept:
        config.unlink()  # transformers makes one of the model's own
    words, args = calling.tokenizer(), GRPOConfig(str(tmp_path), report_to=[])
    model = loading.load_policy(str(folder), args)
    known = loading.known_eos_ids(str(folder), words, args)
    assert known == loading.known_eos_ids(model, words, args) == loading.end_of_sequence_ids(model, words)
    assert known == ({1, 7} if kept else {1})


def no_docstring(a: int):
    return a


@pytest.mark.parametrize(
    ("values", "kind", "reason"),
    [
        ({"tools": [no_docstring]}, ValueError, "how to call 'no_docstring'"),
        ({"tools": [add], "rollout_func": print}, ValueError, "leave out either rollout_func, or tools"),
        ({"environment_factory": object}, TypeError, "has no method reset"),
        ({"environment_factory": {"a": Shelf}}, ValueError, "environment=None, which is not one of those .*: 'a'"),
        ({"tools": [add], "template": None}, ValueError, "tools: the tokenizer has no chat template"),
        ({"tools": [add], "template": "{% for m in messages %}{{ m['content'] + '<end>' }}{% endfor %}"}, ValueError,
         "leaves the call of a tool out"),
        ({"tools": [add], "prompt": "1+2?"}, ValueError, "row 0 of the dataset: prompt='1.2.' is a string"),
    ],
)  # fmt: skip
def test_errors_come_before_a_model_is_loaded(values, kind, reason, calling_model, tmp_path, monkeypatch):
    monkeypatch.setattr("slipstream.trainers.loading.load_policy", lambda *_: pytest.fail("a model was loaded"))
    words = calling.tokenizer()
    words.chat_template = values.pop("template", words.chat_template)
    rows = Dataset.from_list([{"prompt": values.pop("prompt", ROWS[0]["prompt"])}])
    with pytest.raises(kind, match=reason):
        GRPOTrainer(
            str(calling_model), print, GRPOConfig(str(tmp_path), per_device_train_batch_size=8, report_to=[]), rows,
            processing_class=words, **values,
        )  # fmt: skip
