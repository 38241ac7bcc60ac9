"""Judges: what they return, and the OpenAI judge against an endpoint on loopback that misbehaves in many ways."""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from datasets import Dataset
from integration import rounds
from transformers import AutoModelForCausalLM

from slipstream import OnlineDPOConfig, OnlineDPOTrainer
from slipstream.judges import BasePairwiseJudge, OpenAIPairwiseJudge, RewardFunctionJudge
from slipstream.judges.base import as_text
from slipstream.records import Completion

NAN = math.nan


# Judges in general --------------------------------------------------------------------------------------------------


class Longer(BasePairwiseJudge):
    """Prefers what is longer, cannot tell of what has no letters, and always votes for the first of two equals."""

    def judge(self, prompts, completions, shuffle_order=True):
        return [-1 if not (a and b) else int(len(b) > len(a)) for a, b in completions]


class Knowing(BasePairwiseJudge):
    """Has probabilities of its own."""

    def judge(self, prompts, completions, shuffle_order=True, return_scores=False):
        assert return_scores
        return [len(a) / (len(a) + len(b)) if a and b else NAN for a, b in completions]


def known(values: list[float]) -> list[float | None]:
    return [None if math.isnan(v) else v for v in values]


PAIRS = [("long", "a"), ("b", "long"), ("aa", "bb"), ("", "x")]


def test_votes_are_probabilities_of_one_and_zero():
    assert known(Longer().probabilities(["?"] * 4, PAIRS)) == [1.0, 0.0, 1.0, None]


def test_asked_in_both_orders_a_preference_for_a_place_evens_out():
    assert known(Longer().probabilities(["?"] * 4, PAIRS, both_orders=True)) == [1.0, 0.0, 0.5, None]
    judge = Longer()
    judge.both_orders = True
    assert known(judge.probabilities(["?"] * 4, PAIRS)) == [1.0, 0.0, 0.5, None]


def test_probabilities_of_a_judge_that_has_them():
    for both in (False, True):
        assert known(Knowing().probabilities(["?"] * 4, PAIRS, both)) == pytest.approx([0.8, 0.2, 0.5, None])


@pytest.mark.parametrize(
    ("answers", "message"),
    [([0], "returned 1 judgements for 2 pairs"), ([0, 2], "returned 2 for pair 1: it must be 0, 1 or -1")],
)
def test_wrong_answers_of_a_judge_are_named(answers, message):
    class Wrong(BasePairwiseJudge):
        def judge(self, prompts, completions, shuffle_order=True):
            return answers

    with pytest.raises(ValueError, match=f"Wrong {message}"):
        Wrong().probabilities(["?"] * 2, PAIRS[:2])


def test_a_wrong_probability_is_named():
    class Wrong(BasePairwiseJudge):
        def judge(self, prompts, completions, shuffle_order=True, return_scores=False):
            return [1.5]

    with pytest.raises(ValueError, match=r"returned 1\.5 for pair 0: it must be a probability"):
        Wrong().probabilities(["?"], PAIRS[:1])


def test_prompts_and_completions_as_text():
    assert as_text("plain") == "plain"
    assert as_text([{"role": "assistant", "content": "answer"}]) == "answer"
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert as_text(conversation) == "system: Be brief.\n\nuser: What is this?"


# A reward function as judge -----------------------------------------------------------------------------------------


def count_e(prompts, completions, goal=None, **_):
    scores = [None if not c else float(c.count("e")) for c in completions]
    return scores if goal is None else [s if s is None else -abs(s - g) for s, g in zip(scores, goal, strict=True)]


def test_the_higher_reward_wins_and_of_equal_ones_the_first():
    judge = RewardFunctionJudge(count_e)
    prompts, pairs = ["?"] * 4, [("e", "ee"), ("eee", "e"), ("e", "e"), ("", "e")]
    assert judge.judge(prompts, pairs) == [1, 0, 0, -1]
    expected = [1 / (1 + math.exp(-d)) for d in (-1, 2, 0)]
    assert known(judge.probabilities(prompts, pairs)) == pytest.approx([*expected, None])


def test_a_reward_judge_reads_columns_of_the_dataset():
    judge = RewardFunctionJudge(count_e)
    pairs = [("e", "eee"), ("e", "eee")]
    assert judge.judge(["?", "?"], pairs, goal=[1, 3]) == [0, 1]
    for both_orders in (False, True):
        known = judge.probabilities(["?", "?"], pairs, both_orders, {"goal": [1, 3], "prompts": ["x", "x"]})
        assert known == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))])
    # A judge that reads no columns is given none.
    assert Longer().probabilities(["?"], [("e", "eee")], columns={"goal": [1]}) == [0.0]


def test_a_reward_judge_runs_coroutines_and_bears_far_rewards():
    async def far(completions, **_):
        await asyncio.sleep(0)
        return [1e6 if c == "good" else -1e6 for c in completions]

    judge = RewardFunctionJudge(far)
    assert judge.probabilities(["?", "?"], [("good", "bad"), ("bad", "good")]) == [1.0, 0.0]


def test_a_reward_judge_refuses_a_function_of_token_ids():
    def length(completion_ids, **_):
        return [float(len(ids)) for ids in completion_ids]

    with pytest.raises(ValueError, match="reads completion_ids"):
        RewardFunctionJudge(length)


# The OpenAI judge ---------------------------------------------------------------------------------------------------


class Endpoint:
    """Something like OpenAI's `/chat/completions`.

    Attributes:
        answer: (question, how often it has been asked) -> content, or (status, raw body).
        asked: Bodies of all requests, with their headers.
        most: Requests that were being answered at the same time, at most.
        release: Set when the test is over; slow answers wait for it.
    """

    def __init__(self) -> None:
        self.answer: Callable[[str, int], Any] = prefers_good
        self.asked: list[tuple[dict[str, Any], Any]] = []
        self.most = self.present = 0
        self.lock, self.release = threading.Lock(), threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                endpoint.serve(self)

            def log_message(self, *_: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            request_queue_size = 64  # of 5, some of many are asked to come again seconds later

        self.server = Server(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with self.lock:
            before = sum(b["messages"][0]["content"] == question for b, _ in self.asked)
            self.asked.append((body, request.headers))
            self.present += 1
            self.most = max(self.most, self.present)
        answer = self.answer(question, before)
        status, raw = answer if isinstance(answer, tuple) else (200, completion(answer))
        with self.lock:
            self.present -= 1
        try:
            request.send_response(status if request.path == "/v1/chat/completions" else 404)
            request.send_header("Content-Type", "application/json")
            request.send_header("Content-Length", str(len(raw)))
            request.end_headers()
            for i in range(0, len(raw), 1 if self.drips(question) else len(raw)):
                request.wfile.write(raw[i : i + (1 if self.drips(question) else len(raw))])
                if self.drips(question) and self.release.wait(1):
                    return
        except OSError:
            pass  # the judge has hung up: that is what some tests are about

    @staticmethod
    def drips(question: str) -> bool:
        return "drip" in question

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.thread.join(timeout=10)
        self.server.server_close()


def completion(content: Any) -> bytes:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    whole = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return json.dumps(whole).encode()


def shown(question: str) -> tuple[str, str]:
    """The two answers in the order that they were shown in."""
    first, second = re.findall(r"<answer_\d>\n(.*?)\n</answer_\d>", question, re.DOTALL)
    return first, second


def prefers_good(question: str, before: int) -> str:
    return " 0\n" if "good" in shown(question)[0] else "1"


@pytest.fixture
def endpoint(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    made = Endpoint()
    yield made
    made.close()


def judge_of(endpoint: Endpoint, **options: Any) -> OpenAIPairwiseJudge:
    return OpenAIPairwiseJudge("m", base_url=endpoint.url, **{"timeout": 120.0, "batch_timeout": 300.0, **options})


MANY = [(f"good {i}", f"bad {i}") if i % 3 else (f"bad {i}", f"good {i}") for i in range(24)]
RIGHT = [0 if i % 3 else 1 for i in range(24)]


def test_the_order_is_shuffled_and_undone(endpoint):
    judge = judge_of(endpoint, seed=1)
    prompts = [f"prompt {i}" for i in range(24)]
    assert judge.judge(prompts, MANY) == RIGHT
    orders = {}
    for body, _ in endpoint.asked:
        first, second = shown(body["messages"][0]["content"])
        assert first.split()[1] == second.split()[1], "answers to the same prompt"
        orders[first.split()[1]] = (first, second) == MANY[int(first.split()[1])]
    assert 4 < sum(orders.values()) < 20, "both orders occur"
    assert judge.take_failures() == {}

    endpoint.asked.clear()
    assert judge_of(endpoint, seed=1).judge(prompts[::-1], MANY[::-1]) == RIGHT[::-1]
    again = {shown(b["messages"][0]["content"]) for b, _ in endpoint.asked}
    assert again == {MANY[int(i)] if kept else MANY[int(i)][::-1] for i, kept in orders.items()}
    endpoint.asked.clear()
    assert judge.judge(prompts, MANY, shuffle_order=False) == RIGHT
    assert {shown(b["messages"][0]["content"]) for b, _ in endpoint.asked} == set(MANY)


def test_a_judge_that_prefers_a_place_is_evened_out(endpoint):
    endpoint.answer = lambda question, before: "0"
    prompts = [f"prompt {i}" for i in range(24)]
    assert 4 < sum(judge_of(endpoint).judge(prompts, MANY)) < 20
    assert judge_of(endpoint, both_orders=True).probabilities(prompts, MANY) == [0.5] * 24


def test_what_is_sent(endpoint):
    question = "{prompt}|{response0}|{response1}|{{json}}"
    endpoint.answer = lambda question, before: "1"
    judge = judge_of(endpoint, api_key="secret", system_prompt=question, request_options={"max_tokens": 3})
    prompt = [{"role": "user", "content": "Say {response1}"}]
    pair = ([{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}])
    assert judge.judge([prompt], [pair], shuffle_order=False) == [1]
    ((body, headers),) = endpoint.asked
    content = "Say {response1}|yes|no|{json}"
    assert body == {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 3}
    assert headers["Authorization"] == "Bearer secret"


def test_the_key_and_the_address_come_from_the_environment(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    assert OpenAIPairwiseJudge("m").judge(["?"], [("good", "bad")]) == [0]
    ((body, headers),) = endpoint.asked
    assert headers["Authorization"] == "Bearer from-environment"
    assert body["temperature"] == 0.0


def test_no_more_requests_at_a_time_than_allowed(endpoint):
    three = threading.Event()

    def slow(question: str, before: int) -> str:
        if endpoint.present == 3:
            three.set()
        assert three.wait(60)
        time.sleep(0.05)  # a fourth could come in
        return prefers_good(question, before)

    endpoint.answer = slow
    assert judge_of(endpoint, concurrency=3).judge(["?"] * 24, MANY) == RIGHT
    assert endpoint.most == 3


def test_the_batch_has_a_deadline(endpoint):
    def sometimes(question: str, before: int) -> str:
        if "good 1" in question or "good 4" in question:
            endpoint.release.wait(100)
        return prefers_good(question, before)

    for patience in (3.0, 12.0, 48.0):  # on a busy machine the others may need more
        endpoint.answer = prefers_good
        judge = judge_of(endpoint, timeout=100, batch_timeout=patience)
        assert judge.judge(["?"], MANY[:1]) == RIGHT[:1], "what the client loads when it is first used is loaded now"
        endpoint.answer = sometimes
        start = time.monotonic()
        votes = judge.judge(["?"] * 6, MANY[:6])
        seconds = time.monotonic() - start
        if votes.count(-1) == 2:
            break
    assert seconds < patience + 30
    assert votes == [-1 if i in (1, 4) else RIGHT[i] for i in range(6)]
    assert judge.take_failures() == {f"not judged after batch_timeout={patience} seconds": 2}
    assert judge.take_failures() == {}


@pytest.mark.parametrize("way", ["silent", "drip"])
def test_one_request_has_a_deadline(endpoint, way):
    if way == "silent":
        endpoint.answer = lambda question, before: endpoint.release.wait(60) and "0"
    judge = judge_of(endpoint, timeout=0.7)
    start = time.monotonic()
    assert judge.judge([way], [("good", "bad")]) == [-1]
    assert time.monotonic() - start < 50
    assert judge.take_failures() == {"no answer after timeout=0.7 seconds": 1}


NONSENSE: dict[str, Any] = {
    "a word": "the first",
    "a third number": "2",
    "two digits": "01",
    "nothing": "",
    "null": None,
    "no choices": (200, json.dumps({"choices": []}).encode()),
    "no completion": (200, b"[]"),
    "no JSON": (200, b"{"),
    "bad request": (400, b"{}"),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_no_vote(endpoint, kind):
    endpoint.answer = lambda question, before: NONSENSE[kind] if "bad 1" in question else "0"
    judge = judge_of(endpoint)
    pairs = [("bad 0", "x"), ("bad 1", "x")]
    assert judge.judge(["?"] * 2, pairs, shuffle_order=False) == [0, -1]
    assert sum(judge.take_failures().values()) == 1
    assert len(endpoint.asked) == 2, "asking again would not help"
    assert known(judge.probabilities(["?"] * 2, pairs, both_orders=True)) == [0.5, None]


def test_faults_that_pass_are_asked_again(endpoint):
    endpoint.answer = lambda question, before: prefers_good(question, before) if before else (429, b"{}")
    judge = judge_of(endpoint)
    assert judge.judge(["?"] * 2, MANY[:2]) == RIGHT[:2]
    assert len(endpoint.asked) == 4
    endpoint.answer = lambda question, before: (503, b"{}")
    assert judge.judge(["?"], MANY[2:3]) == [-1]
    assert judge.take_failures() == {"HTTP 503": 1}


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_name_ends_the_run_before_it_has_begun(endpoint, status):
    endpoint.answer = lambda question, before: (status, b'{"error": "no such model"}')
    judge = judge_of(endpoint)
    with pytest.raises(RuntimeError, match=f"answered {status} for model 'm'.*no such model.*Check base_url"):
        judge.judge(["?"] * 2, MANY[:2])
    endpoint.answer = prefers_good
    assert judge.judge(["?"] * 2, MANY[:2]) == RIGHT[:2]
    endpoint.answer = lambda question, before: (status, b"{}")
    assert judge.judge(["?"], MANY[:1]) == [-1], "later it is an outage like others"


def test_requests_have_a_limit(endpoint):
    judge = judge_of(endpoint, max_requests=5)
    assert -1 not in judge.judge(["?"] * 3, MANY[:3])
    with pytest.raises(RuntimeError, match=r"max_requests=5: 3 have been made, and 3 more are asked for.* raise it"):
        judge.judge(["?"] * 3, MANY[:3])
    assert len(endpoint.asked) == 3, "none is paid for that could not be used"
    assert -1 not in judge.judge(["?"] * 2, MANY[:2])


def test_there_is_no_limit_unless_it_is_set(endpoint):
    judge = judge_of(endpoint)
    judge.requests = 10**6
    assert judge.judge(["?"], [("good", "bad")]) == [0]


def test_a_run_ends_when_its_requests_do(endpoint, tiny_model, tmp_path):
    """Going on would be steps that learn from nothing."""
    judge = judge_of(endpoint, max_requests=3)
    trainer = rounds.make("OnlineDPO", tiny_model, tmp_path, per_device_train_batch_size=2,
                          arguments={"reward_funcs": None, "judge": judge})  # fmt: skip
    with pytest.raises(RuntimeError, match="max_requests=3: 2 have been made"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_nobody_there(monkeypatch):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        judge = OpenAIPairwiseJudge("m", base_url=f"http://127.0.0.1:{held.getsockname()[1]}/v1", timeout=20.0)
        assert judge.judge(["?"], [("a", "b")]) == [-1]
    assert judge.take_failures() == {"no connection": 1}


def test_it_can_be_asked_from_within_a_loop(endpoint):
    async def notebook() -> list[int]:
        return judge_of(endpoint).judge(["?"], [("good", "bad")])

    assert asyncio.run(notebook()) == [0]
    assert judge_of(endpoint).judge([], []) == []


def test_a_trainer_leaves_out_what_could_not_be_judged(endpoint, tiny_model, tmp_path, caplog):
    """Learning from four prompts, two of which fail, is learning from the other two."""

    def moved(prompts: list[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        trainer = OnlineDPOTrainer(
            str(tiny_model), judge=judge_of(endpoint), train_dataset=Dataset.from_dict({"prompt": prompts}),
            args=OnlineDPOConfig(
                str(tmp_path), per_device_train_batch_size=len(prompts), max_steps=1, logging_steps=1, report_to=[],
                max_new_tokens=6, learning_rate=1e-3, save_strategy="no", disable_tqdm=True, html_report=False,
                shuffle_dataset=False, use_cpu=True, max_grad_norm=0.0, optim="sgd",
            ),
        )  # fmt: skip
        trainer.engine = Replies(trainer.engine)
        trainer.train()
        logged = trainer.state.log_history[0]
        trainer.close()
        return logged, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    endpoint.answer = lambda question, before: "cannot say" if "hard" in question else "0"
    some, with_failures = moved(["easy 1", "hard 1", "easy 2", "hard 2"])
    assert "2 judgements failed, and their pairs are left out: the answer is neither 0 nor 1 (2)" in caplog.text
    every, without = moved(["easy 1", "easy 2"])
    assert (some["judgements/failed"], every["judgements/failed"]) == (0.5, 0)
    assert some["loss"] == pytest.approx(every["loss"], rel=1e-5)
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    for name, value in with_failures.items():
        step = without[name] - start[name]
        assert torch.allclose(value - start[name], step, rtol=1e-3, atol=1e-8 + 1e-4 * step.abs().max().item())
    assert any((value - start[name]).abs().max() > 1e-6 for name, value in without.items())


class Replies:
    """An engine whose completions follow from the prompt alone, for runs with different prompts beside it."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def generate(self, requests: Any, sampling: Any, on_finished: Any = None) -> list[list[Completion]]:
        return [
            [Completion([*request.prompt_ids[-3:], 7 + i, 1], None, 0, "stop") for i in range(2)]
            for request in requests
        ]


def test_settings_are_checked(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        OpenAIPairwiseJudge()
    for name, value in (("concurrency", 0), ("timeout", 0), ("batch_timeout", -1), ("max_requests", 0)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            OpenAIPairwiseJudge(api_key="k", **{name: value})
    with pytest.raises(ValueError, match=r"system_prompt has no \{response0\}, \{response1\}"):
        OpenAIPairwiseJudge(api_key="k", system_prompt="{prompt}")
    with pytest.raises(ValueError, match="system_prompt cannot be filled in"):
        OpenAIPairwiseJudge(api_key="k", system_prompt="{prompt} {response0} {response1} {answer}")
