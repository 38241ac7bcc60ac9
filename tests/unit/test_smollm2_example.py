"""The SmolLM2 example's data and reward. Nothing is downloaded here."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make_data, make_model, reward = load("make_data"), load("make_model"), load("reward")


@pytest.fixture(scope="module")
def rows():
    return make_data.make_rows()


@pytest.fixture(scope="module")
def some():
    stream = make_data.problems(random.Random(1))
    return [next(stream) for _ in range(3000)]


# --- data ----------------------------------------------------------------------------------------------------------


def test_sizes_and_format(rows):
    train, test = rows
    assert (len(train), len(test)) == (4096, 256)
    for row in train + test:
        roles = [message["role"] for message in row["prompt"]]
        assert roles == ["system"] + ["user", "assistant"] * 4 + ["user"]
        assert row["prompt"][0]["content"].endswith("#### number")
        assert re.fullmatch(r"[A-Z0-9][^{}]*\?", row["prompt"][-1]["content"])
        assert re.fullmatch(r"\d+", row["solution"])
        assert 0 < int(row["solution"]) <= 200


def test_train_and_test_are_disjoint_but_for_words():
    words = set(make_data.NAMES) | set(make_data.THINGS) | set(make_data.CONTAINERS) | set(make_data.PLACES)
    # Longest first, so that "strawberries" is not left with a piece of it; initials may be capital.
    blank = re.compile("|".join(sorted((re.escape(word) for word in words), key=len, reverse=True)), re.IGNORECASE)
    train, test = make_data.make_rows(1500, 256)
    train_shapes, test_shapes = (
        {blank.sub("_", row["prompt"][-1]["content"]) for row in part} for part in (train, test)
    )
    assert not train_shapes & test_shapes
    assert len(test_shapes) == 256
    questions = [row["prompt"][-1]["content"] for row in train]
    assert len(set(questions)) == len(questions)


def test_every_template_is_used_and_one_step_ones_twice(some):
    counts = Counter(problem.key[0] for problem in some)
    assert set(counts) == set(range(len(make_data.TEMPLATES)))
    first_two_step = len(make_data.ONE_STEP)
    one = sum(count for index, count in counts.items() if index < first_two_step) / first_two_step
    two = sum(count for index, count in counts.items() if index >= first_two_step) / len(make_data.TWO_STEPS)
    assert one / two == pytest.approx(2.0, rel=0.1)


def test_answers_follow_from_the_text(some):
    """The templates with one operation say it in words: read the two numbers from the text and work it out."""
    operations = {
        "now": lambda a, b: a + b, "in all": lambda a, b: a + b, "in total": lambda a, b: a + b,
        "left": lambda a, b: a - b, "stayed": lambda a, b: a - b, "still in": lambda a, b: a - b,
        "dollars each": lambda a, b: a * b, "in each.": lambda a, b: a * b, "every day": lambda a, b: a * b,
        "same number in each": lambda a, b: a // b, "tickets can": lambda a, b: a // b,
        "in every box": lambda a, b: a // b,
    }  # fmt: skip
    checked = Counter()
    for problem in some:
        numbers = [int(number) for number in re.findall(r"\d+", problem.question)]
        if problem.key[0] >= len(make_data.ONE_STEP) or len(numbers) != 2:
            continue
        # The longest phrase wins: "same number in each" is no product.
        phrase = max((p for p in operations if p in problem.question), key=len, default=None)
        if phrase is not None:
            assert operations[phrase](*numbers) == problem.answer, problem.question
            checked[phrase] += 1
    assert set(checked) == set(operations)


def test_two_step_answers(some):
    for template_index, *numbers in {problem.key for problem in some if problem.key[0] >= len(make_data.ONE_STEP)}:
        a, b, *rest = numbers
        c = rest[0] if rest else 0
        expected = {
            "bought": a + b - c, "get off": a - b + c, "gave {b}": a - b - c, "picked": a + b + c,
            "and a bag": a * b + c,
            "outside": a * b + c, "gave away": a * b - c, "more than": 2 * a + b, "times as many": a * (1 + b),
            "dollar bill": a - b * c, "broken": a * b - c,
        }  # fmt: skip
        text = make_data.TEMPLATES[template_index].text
        [phrase] = [phrase for phrase in expected if phrase in text]
        value = eval(make_data.TEMPLATES[template_index].answer, {}, {"a": a, "b": b, "c": c})
        assert value == expected[phrase] > 0


def test_the_files_are_always_the_same(tmp_path):
    subprocess.run([sys.executable, str(EXAMPLE / "make_data.py"), "--out", str(tmp_path)], check=True, timeout=300)
    lines = {name: (tmp_path / f"{name}.jsonl").read_text() for name in ("train", "test")}
    digests = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in lines.items()}
    assert digests == {"train": "abb7735d0ff11b43", "test": "fc9e435ebe0c5c43"}
    assert make_data.make_rows()[1] == [json.loads(line) for line in lines["test"].splitlines()]


# --- reward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ben has 3 + 4 = 7 pens.\n#### 7", 1.0),
        ("#### 7", 1.0),
        ("#### 7\n", 1.0),
        ("#### 07", 1.0),
        ("Ben has 3 + 4 = 7 pens.\n#### 8", 0.0),
        ("Ben has 7 pens.", 0.0),
        ("7", 0.0),
        ("#### 7 pens", 0.0),
        ("#### 7.5", 0.0),
        ("#### 7\nor #### 8", 0.0),
        ("#### 8\n#### 7", 1.0),
        ("#### 7\n#### 8", 0.0),
        ("It is #### 7", 0.0),
        ("#### -7", 0.0),
        ("#### 77", 0.0),
        ("", 0.0),
    ],
)
def test_reward(text, expected):
    completions = [[{"role": "assistant", "content": text}]]
    assert reward.correct(completions=completions, solution=["7"], prompts=[None]) == [expected]


def test_near_tells_wrong_answers_apart():
    texts = ["so\n#### 7", "#### 8", "#### 17", "7", "#### 7 apples"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward.near(completions, solution=["7"] * 5) == [0.5, 0.25, 0.5 / 11, 0.0, 0.0]


def test_the_examples_in_the_prompt_earn_the_reward():
    for question, answer in make_data.EXAMPLES:
        assert len(re.findall(r"\d+", question)) == 2
        solution = answer.rpartition(" ")[2]
        assert reward.correct([[{"role": "assistant", "content": answer}]], [solution]) == [1.0]
        left, right = re.search(r"(\d+ [-+*/] \d+) = (\d+)", answer).groups()
        assert eval(left) == int(right) == int(solution)


def test_reward_checks_the_lengths():
    with pytest.raises(ValueError, match="solution has 1 values for 0 completions"):
        reward.correct([], ["7"])


# --- the rest ------------------------------------------------------------------------------------------------------


def test_the_gguf_file_is_found(tmp_path):
    gguf, wheel = tmp_path / "model.gguf", tmp_path / "some.whl"
    gguf.write_bytes(b"GGUF")
    assert make_model.find_gguf(gguf, tmp_path) == gguf
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/model.gguf", b"inside")
    assert make_model.find_gguf(wheel, tmp_path / "out").read_bytes() == b"inside"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/readme", b"")
    with pytest.raises(ValueError, match=r"must hold one \.gguf file, it holds 0"):
        make_model.find_gguf(wheel, tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        make_model.find_gguf(tmp_path / "missing.gguf", tmp_path)


def test_the_configuration_is_valid(tmp_path, monkeypatch):
    from slipstream.commands.loading import load_reward_function
    from slipstream.commands.train import parse_settings
    from slipstream.trainers.grpo import GRPOConfig

    settings = yaml.safe_load((EXAMPLE / "grpo.yaml").read_text())
    # transformers refuses bf16 without an accelerator.
    run, args = parse_settings(settings | {"output_dir": str(tmp_path), "bf16": False}, GRPOConfig)
    assert args.generation_batch_size == 512
    assert args.generation_batch_size // args.num_generations == 32
    assert (args.num_generations_eval, args.eval_temperature, args.eval_on_start) == (1, 0.0, True)
    assert args.learning_rate == 1e-5
    monkeypatch.chdir(EXAMPLE.parents[1])
    [name] = run.reward_funcs
    assert load_reward_function(name)([[{"role": "assistant", "content": "#### 3"}]], solution=["3"]) == [1.0]


@pytest.mark.parametrize("config", ["OnlineDPOConfig", "NashMDConfig", "XPOConfig"])
def test_the_configuration_of_the_pairwise_trainers_is_valid(config, tmp_path, monkeypatch):
    import slipstream
    from slipstream.commands.loading import load_reward_function
    from slipstream.commands.train import parse_settings

    settings = yaml.safe_load((EXAMPLE / "pairs.yaml").read_text())
    run, args = parse_settings(settings | {"output_dir": str(tmp_path), "bf16": False}, getattr(slipstream, config))
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 128
    monkeypatch.chdir(EXAMPLE.parents[1])
    rewards = [load_reward_function(name) for name in run.reward_funcs]
    assert [r([[{"role": "assistant", "content": "#### 3"}]], solution=["3"]) for r in rewards] == [[1.0], [0.5]]
