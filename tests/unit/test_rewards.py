"""The ready reward functions, against values worked out by hand."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import slipstream.rewards
from slipstream.rewards import (
    accuracy_reward,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)
from slipstream.rewards.accuracy import _quick
from slipstream.rewards.math_pool import POOL, MathPool

TOWER = r"\boxed{9^{9^{9^{9}}}}"
NESTED = "$" + "(" * 40 + "1" + ")" * 40 + "$"  # Parsing takes time exponential in the depth.


@pytest.fixture(scope="module", autouse=True)
def _close_pool():
    yield
    POOL.close()


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


# --- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "text", "expected"),
    [
        ("42", r"so \boxed{42}", 1.0),
        ("42", r"so \boxed{42.0}", 1.0),
        ("42", r"so \boxed{43}", 0.0),
        ("42", "42", 1.0),
        ("42", " -42\n", 0.0),
        ("42", "I give up", 0.0),
        ("42", "it is 42", 0.0),  # Not marked as an answer.
        ("#### 42", r"\boxed{42}", 1.0),
        ("1/2", "0.5", 1.0),
        ("1/2", r"\boxed{\frac{2}{4}}", 1.0),
        (r"$\frac{1}{2}$", r"The answer is $\frac{1}{2}$", 1.0),
        (r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}", 0.0),
        (r"$x^2 - 1$", r"\boxed{(x-1)(x+1)}", 1.0),
        (r"$x^2 - 1$", r"\boxed{(x-1)(x-1)}", 0.0),
        (r"$\sqrt{8}$", r"\boxed{2\sqrt{2}}", 1.0),
        (r"$\{1, 2\}$", r"\boxed{\{2, 1\}}", 1.0),
        ("1,234", r"\boxed{1234}", 1.0),
        ("$50\\%$", r"\boxed{50\%}", 1.0),
        ("3", r"first $\boxed{2}$, no: $\boxed{3}$", 1.0),
        ("$2,3$", r"\boxed{2} and \boxed{3}", 1.0),
        ("3", r"\boxed{", 0.0),
        ("3", "", 0.0),
    ],
)
def test_accuracy(gold, text, expected):
    assert accuracy_reward([text, chat(text)], solution=[gold, gold]) == [expected, expected]


def test_accuracy_takes_the_last_assistant_message():
    conversation = [
        {"role": "assistant", "content": r"\boxed{1}", "tool_calls": []},
        {"role": "tool", "content": r"\boxed{2}"},
        {"role": "assistant", "content": [{"type": "text", "text": r"\boxed"}, {"type": "text", "text": "{3}"}]},
        {"role": "user", "content": r"\boxed{4}"},
    ]
    assert accuracy_reward([conversation] * 3, solution=["1", "3", "4"]) == [0.0, 1.0, 0.0]
    assert accuracy_reward([[{"content": r"\boxed{3}"}]], ["3"]) == [1.0]
    assert accuracy_reward([[{"role": "assistant", "content": None}]], ["3"]) == [0.0]


def test_gold_that_cannot_be_parsed_is_not_scorable():
    assert accuracy_reward([r"\boxed{3}"] * 4, solution=["no number here", None, "", "3"]) == [None, None, None, 1.0]
    assert accuracy_reward(["nothing"], solution=["no number here"]) == [None]


def test_numbers_are_accepted_as_solutions():
    assert accuracy_reward([r"\boxed{3}", r"\boxed{3}"], solution=[3, 2.5]) == [1.0, 0.0]
    with pytest.raises(TypeError, match=r"a solution must be a string, a number or None, got list \[3\]"):
        accuracy_reward([r"\boxed{3}"], solution=[[3]])


def test_lengths_must_match():
    with pytest.raises(ValueError, match="solution has 1 values for 2 completions"):
        accuracy_reward(["1", "2"], solution=["1"])
    with pytest.raises(TypeError, match="give the dataset a column 'solution'"):
        accuracy_reward(["1", "2"], prompts=["a", "b"])
    with pytest.raises(TypeError, match="solution must be a list"):
        accuracy_reward(["1", "2"], solution="12")
    with pytest.raises(ValueError, match="completion_ids has 1 values for 2 completions"):
        get_cosine_scaled_reward(10)(["1", "2"], solution=["1", "2"], completion_ids=[[1]])


def test_what_a_completion_may_be():
    with pytest.raises(TypeError, match="a completion must be a string or a list of messages"):
        accuracy_reward([3], solution=["3"])
    with pytest.raises(TypeError, match="completions must be a list"):
        think_format_reward("one text")
    with pytest.raises(ValueError, match="no assistant message"):
        accuracy_reward([[{"role": "user", "content": "3"}]], solution=["3"])


def test_extra_columns_for_the_table():
    logged = {}
    accuracy_reward(
        [r"\boxed{3}", "none", r"\boxed{x + 1}"],
        solution=["3", "3", "$x+1$"],
        log_extra=lambda name, values: logged.update({name: values}),
    )
    assert logged == {"solution": ["3", "3", "$x+1$"], "answer_parsed": ["3", "[none]", "x + 1"]}


@given(
    gold=st.integers(-200, 200).map(str),
    answer=st.sampled_from(["{}", "{}.0", "{}/1", r"\frac{{{}}}{{1}}"]),
    value=st.integers(-200, 200),
    context=st.sampled_from([r"\boxed{{{}}}", r"so $x = \boxed{{{}}}$ for $y = 2$.", "\\[\n\\boxed{{{}}}\n\\] apples"]),
)
def test_the_shortcut_agrees_with_math_verify(gold, answer, value, context):
    text = context.format(answer.format(value))
    quick = _quick(gold, text)
    assert quick is not None
    assert quick[0] == float(value == int(gold))
    [slow] = POOL.compare([(gold, text)], 5.0)
    assert slow is not None
    assert slow[0] == bool(quick[0])


@pytest.mark.parametrize(
    "gold", ["+5", r"\dfrac{15}{3}", r"+\tfrac{5}{1}", r" \frac{-5}{-1}", "5", r"$\dfrac{5}{1}$", "10/2"]
)
def test_a_gold_number_can_be_parsed_whatever_a_completion_looks_like(gold):
    # The second and the last are left to math-verify.
    answers = [r"\boxed{5}", r"$x = 5$, \boxed{5} = \boxed{5}", r"\boxed{4}", "4", r"\boxed{x + 4}"]
    assert accuracy_reward(answers, [gold] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{3} and \boxed{4}",
        r"\boxed{3}\%",
        r"\boxed{3}$ percent",
        r"\boxed{3} but the final answer is $4$",
        r"\boxed{2.9999999}",
        r"\boxed{\frac{1}{0}}",
    ],
)
def test_the_shortcut_leaves_doubtful_texts_alone(text):
    assert _quick("3", text) is None


@pytest.mark.parametrize(
    "text", ["The answer is " + NESTED, TOWER, r"\boxed{(1+x)^{100000}}", r"\boxed{\sum_{i=1}^{10000000} i^i}"]
)
def test_time_limit_holds_off_the_main_thread(text, caplog):
    answers = []

    def score():
        start = time.monotonic()
        rewards = accuracy_reward([text, r"\boxed{1 + 2}"], solution=["$3$", "$3$"], time_limit=0.5)
        answers.append((rewards, time.monotonic() - start))

    accuracy_reward([r"\boxed{1 + 2}"], solution=["3"])  # The first worker is started outside the timing.
    with caplog.at_level(logging.WARNING, logger="slipstream.rewards.math_pool"):
        thread = threading.Thread(target=score)
        thread.start()
        thread.join(120)
    [(rewards, seconds)] = answers
    assert rewards == [0.0, 1.0]
    assert seconds < 50  # Without a limit it would never end; GRACE_SECONDS are for a worker that does nothing.
    assert "no verdict within 0.5 s" in caplog.text


def test_time_in_which_a_worker_gets_no_core_does_not_count():
    command = [sys.executable, "-P", Path(slipstream.rewards.__file__).with_name("math_worker.py")]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout.readline() == '"ready"\n'
        process = psutil.Process(worker.pid)
        began = sum(process.cpu_times()[:2])
        worker.stdin.write(json.dumps([0.5, NESTED]) + "\n")
        worker.stdin.flush()
        deadline = time.monotonic() + 60
        while sum(process.cpu_times()[:2]) < began + 0.1:
            assert time.monotonic() < deadline
            time.sleep(0.01)  # between two looks at another process
        process.suspend()
        time.sleep(0.6)  # more than the limit
        process.resume()
        _, status, used = os.wait4(worker.pid, 0)
        worker.returncode = os.waitstatus_to_exitcode(status)
        assert worker.returncode == -signal.SIGPROF
        assert 0.4 < used.ru_utime + used.ru_stime - began < 2
    finally:
        worker.kill()
        worker.stdin.close()
        worker.stdout.close()


def test_gold_that_takes_too_long_is_not_scorable():
    assert accuracy_reward([r"\boxed{1+2}"], solution=[NESTED], time_limit=0.5) == [None]


def test_time_limit_is_checked():
    with pytest.raises(ValueError, match="time_limit must be more than 0 seconds, got 0"):
        accuracy_reward(["1"], solution=["1"], time_limit=0)
    with pytest.raises(TypeError, match="time_limit must be a number"):
        accuracy_reward(["1"], solution=["1"], time_limit="5")


def test_calls_from_several_threads():
    results = {}

    def score(n):
        results[n] = accuracy_reward([rf"\boxed{{x + {n}}}", r"\boxed{x}"], solution=[f"$x+{n}$"] * 2)

    threads = [threading.Thread(target=score, args=(n,)) for n in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results == {n: [1.0, 0.0] for n in range(1, 7)}


def test_several_workers_give_the_answers_in_order():
    pool = MathPool(workers=2)
    try:
        pairs = [("$x+1$", rf"\boxed{{x + {n % 3}}}") for n in range(100)]
        verdicts = pool.compare(pairs, 5.0)
        assert len(pool._workers) == 2
        assert [verdict[0] for verdict in verdicts] == [n % 3 == 1 for n in range(100)]
    finally:
        pool.close()


def test_512_short_completions_take_no_time(monkeypatch):
    monkeypatch.setattr(POOL, "_ask_all", lambda questions, seconds: [pytest.fail(f"{q}: asked") for q in questions])
    texts = [rf"We add and get \boxed{{{n % 100}}}." for n in range(512)]
    start = time.thread_time()
    rewards = accuracy_reward(texts, solution=["7"] * 512)
    assert time.thread_time() - start < 0.5
    assert sum(rewards) == sum(n % 100 == 7 for n in range(512))


@pytest.mark.parametrize("ending", ["sys.exit(0)", "os.kill(os.getpid(), 9)", "raise KeyboardInterrupt"])
def test_no_worker_outlives_the_process(ending):
    script = f"""
        import os, sys
        from slipstream.rewards import accuracy_reward
        from slipstream.rewards.math_pool import POOL
        assert accuracy_reward([r"\\boxed{{x + 1}}"], solution=["$x+1$"]) == [1.0]
        print(POOL._workers[0]._process.pid, flush=True)
        {ending}
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, timeout=300)
    pid, deadline = int(done.stdout), time.monotonic() + 60
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)  # between two looks at another process
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_users_script_runs_once(tmp_path):
    script = tmp_path / "train.py"  # Without `if __name__ == "__main__"`, as many are.
    script.write_text(
        "from slipstream.rewards import accuracy_reward\n"
        "print('ran')\n"
        "print(accuracy_reward([r'\\boxed{x + 1}'], solution=['$x+1$']))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "ran\n[1.0]\n"


# --- reasoning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"<think>\boxed{4}</think> \boxed{3}", 1.0),
        (r"<think>\boxed{3}</think> \boxed{4}", 0.0),
        (r"<think>\boxed{3}", 0.0),
        (r"a</think>\boxed{4}</think>\boxed{3}", 1.0),
        (r"<think>\boxed{3}</think>", 0.0),
    ],
)
def test_reasoning_accuracy(text, expected):
    assert reasoning_accuracy_reward([text, chat(text)], solution=["3", "3"]) == [expected, expected]


def test_reasoning_delimiters():
    texts = [r"[end]\boxed{3}", r"</think>\boxed{3}", r"[end]\boxed{3}[stop]$\boxed{4}$"]
    assert reasoning_accuracy_reward(texts, ["3"] * 3, reasoning_delimiters=["[end]"]) == [1.0, 0.0, 0.0]
    assert reasoning_accuracy_reward(texts, ["4"] * 3, reasoning_delimiters=["[stop]", "[end]"]) == [0.0, 0.0, 1.0]
    assert reasoning_accuracy_reward([r"</think>\boxed{3}", r"\boxed{3}"], ["word", "word"]) == [None, 0.0]
    with pytest.raises(ValueError, match="reasoning_delimiters must be a list of non-empty strings, got '</t>'"):
        reasoning_accuracy_reward(["x"], ["3"], reasoning_delimiters="</t>")


# --- format --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nWhy.\n</think>\nBecause.", 1.0),
        ("<think></think>", 1.0),
        ("<think>\nWhy.\nBecause.", 0.0),
        ("Hm. <think>Why.</think> Because.", 0.0),
        ("<think>one <think>two</think></think>", 0.0),
        ("<think>one</think> <think>two</think>", 0.0),
        ("</think><think>", 0.0),
        ("", 0.0),
    ],
)
def test_think_format(text, expected):
    assert think_format_reward(completions=[text, chat(text)], prompts=["p", "p"]) == [expected, expected]


# --- cosine --------------------------------------------------------------------------------------------------------

RIGHT, WRONG = r"\boxed{3}", r"\boxed{4}"


@given(lengths=st.lists(st.integers(0, 300), min_size=2, max_size=20), max_len=st.integers(1, 200))
def test_cosine_is_monotone_and_bounded(lengths, max_len):
    reward = get_cosine_scaled_reward(max_len)
    lengths = sorted(lengths)
    ids = [[0] * length for length in lengths]
    right = reward(completions=[RIGHT] * len(ids), solution=["3"] * len(ids), completion_ids=ids)
    wrong = reward(completions=[WRONG] * len(ids), solution=["3"] * len(ids), completion_ids=ids)
    assert right == sorted(right, reverse=True)
    assert wrong == sorted(wrong)
    assert all(0.5 <= value <= 1.0 for value in right)
    assert all(-1.0 <= value <= -0.5 for value in wrong)


def test_cosine_values():
    reward = get_cosine_scaled_reward(max_len=100)
    ids = [[1] * n for n in (0, 50, 100, 1000, 0, 50, 100, 25, 7)]
    texts = [RIGHT] * 4 + [WRONG] * 3 + [RIGHT] * 2
    expected = [1.0, 0.75, 0.5, 0.5, -1.0, -0.75, -0.5, 0.5 + 0.25 * (1 + math.sqrt(0.5)), None]
    got = reward(texts, ["3"] * 8 + ["word"], ids)
    assert got[:8] == pytest.approx(expected[:8], abs=1e-12)
    assert got[8] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_len": 0}, "max_len must be at least 1 token, got 0"),
        ({"max_len": 2.5}, "max_len must be an integer, got float 2.5"),
        ({"max_len": True}, "max_len must be an integer"),
        ({"max_len": 9, "min_value_wrong": 0.0}, "min_value_wrong must not exceed max_value_wrong, got 0.0 > -0.5"),
        ({"max_len": 9, "max_value_correct": math.nan}, "max_value_correct must be finite, got nan"),
    ],
)
def test_cosine_arguments_are_checked(arguments, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        get_cosine_scaled_reward(**arguments)


# --- repetition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "size", "expected"),
    [
        ([1, 2, 3, 4, 5], 3, 0.0),
        ([1, 2], 3, 0.0),
        ([], 3, 0.0),
        ([1, 2, 3], 3, 0.0),
        ([7] * 10, 3, -(1 - 1 / 8)),
        ([1, 2, 1, 2, 1], 2, -(1 - 2 / 4)),
        ([1, 2, 3, 1, 2, 3, 1], 3, -(1 - 3 / 5)),
        ([1, 1], 1, -0.5),
    ],
)
def test_repetition(ids, size, expected):
    assert get_repetition_penalty_reward(size)(completion_ids=[ids], prompts=["p"]) == [pytest.approx(expected)]
    assert get_repetition_penalty_reward(size, -2.0)([ids]) == [pytest.approx(2 * expected)]


@given(st.lists(st.lists(st.integers(0, 3), max_size=30), max_size=5), st.integers(1, 5))
def test_repetition_is_bounded(ids, size):
    values = get_repetition_penalty_reward(size)(ids)
    assert len(values) == len(ids)
    assert all(-1.0 < value <= 0.0 for value in values)


def test_repetition_arguments_are_checked():
    with pytest.raises(ValueError, match="ngram_size must be at least 1 token, got 0"):
        get_repetition_penalty_reward(0)
    with pytest.raises(ValueError, match="max_penalty must be zero or negative"):
        get_repetition_penalty_reward(3, 1.0)


# --- overlong ------------------------------------------------------------------------------------------------------


def test_soft_overlong():
    punish = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    lengths = [0, 80, 81, 90, 100, 101, 500]
    expected = [0.0, 0.0, -0.05, -0.5, -1.0, -1.0, -1.0]
    assert punish(completion_ids=[[0] * n for n in lengths], prompts=None) == pytest.approx(expected)
    assert get_soft_overlong_punishment(100, 0)([[0] * 100, [0] * 101]) == [0.0, -1.0]


@pytest.mark.parametrize(
    ("length", "cache", "message"),
    [
        (0, 0, "max_completion_len must be at least 1 token, got 0"),
        (10, 11, "soft_punish_cache must be between 0 and max_completion_len (10) tokens, got 11"),
        (10, -1, "soft_punish_cache must be between 0"),
        (10, "2", "soft_punish_cache must be an integer, got str '2'"),
    ],
)
def test_overlong_arguments_are_checked(length, cache, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        get_soft_overlong_punishment(length, cache)


# --- what the trainer needs of them --------------------------------------------------------------------------------


def test_names_and_pickling():
    functions = [get_cosine_scaled_reward(10), get_repetition_penalty_reward(), get_soft_overlong_punishment(10, 5)]
    names = ["cosine_scaled_reward", "repetition_penalty_reward", "soft_overlong_punishment_reward"]
    assert [function.__name__ for function in functions] == names
    copies = pickle.loads(pickle.dumps(functions))
    assert [copy.__name__ for copy in copies] == names
    assert copies == functions


def test_import_is_light():
    heavy = ("torch", "sympy", "math_verify")
    code = f"import sys, slipstream.rewards; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"
