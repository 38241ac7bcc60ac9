"""`slipstream rloo`, `online-dpo`, `nash-md` and `xpo`: one implementation, and judges by name."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

import slipstream
from slipstream.commands.loading import load_judge, load_scorer
from slipstream.commands.main import TRAINERS
from slipstream.commands.train import _classes, parse_settings

NEEDED = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
JUDGE = """
from slipstream.judges import BasePairwiseJudge

class Digits(BasePairwiseJudge):
    def __init__(self, at_least=0):
        self.at_least = at_least

    def judge(self, prompts, completions, shuffle_order=True):
        counts = [[sum(c.isdigit() for c in text) for text in pair] for pair in completions]
        return [-1 if max(pair) < self.at_least else int(pair[1] > pair[0]) for pair in counts]
"""


def slipstream_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "slipstream", *map(str, arguments)], capture_output=True, text=True, timeout=600
    )


@pytest.fixture
def judge(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    return f"{tmp_path / 'judge.py'}:Digits"


@pytest.fixture
def settings(tiny_model, tmp_path):
    for split in ("train", "test"):
        rows = [json.dumps({"prompt": f"{a}+{b}=", "solution": str(a + b)}) for a in range(4) for b in range(4)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    file = tmp_path / "run.yaml"
    file.write_text(f"""
model_name_or_path: {tiny_model}
dataset_name: {tmp_path}
output_dir: {tmp_path / "out"}
max_steps: 2
max_completion_length: 8
gradient_checkpointing: false
eval_strategy: steps
eval_steps: 2
eval_on_start: true
report_to: none
""")
    return file


def test_every_trainer_has_a_command():
    for algorithm in TRAINERS:
        trainer, config = _classes(algorithm)
        assert trainer.config_class is config
        assert trainer.__name__ in slipstream.__all__


@pytest.mark.parametrize("algorithm", ["rloo", "xpo"])
def test_a_run_by_rewards(settings, tmp_path, algorithm):
    (tmp_path / "reward.py").write_text(
        "def right(completions, **_):\n    return [float('1' in c) for c in completions]\n"
    )
    done = slipstream_command(algorithm, "--config", settings, "--reward_funcs", f"{tmp_path / 'reward.py'}:right")
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.fullmatch(r"held-out accuracy [01]\.\d\d -> [01]\.\d\d in \d+ s", done.stdout.strip().splitlines()[-1])
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("algorithm", "metric", "result"),
    [
        ("nash-md", "eval_rewards/probabilities", "win rate against the opponent"),
        ("xpo", "eval_judgements/won", "win rate against the reference"),
    ],
)
def test_a_run_by_a_judge(settings, judge, tmp_path, algorithm, metric, result):
    done = slipstream_command(algorithm, "--config", settings, "--judge", judge, "--judge_kwargs", "{at_least: 1}",
                              "--beta", "[1e-1, 2e-1]")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    line = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch(rf"held-out {result} [01]\.\d\d -> [01]\.\d\d in \d+ s", line), line
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    found = [f"{entry[metric]:.2f}" for entry in history if metric in entry]
    assert re.findall(r"[01]\.\d\d", line) == [found[0], found[-1]]


def test_what_online_dpo_has_learnt_from_a_judge_has_no_before(settings, judge, tmp_path):
    """The policy has not moved from the reference then: it agrees with nobody about anything."""
    done = slipstream_command("online-dpo", "--config", settings, "--judge", judge, "--use_vllm", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    line = done.stdout.strip().splitlines()[-1]
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    before, after = (entry["eval_rewards/accuracies"] for entry in history if "eval_rewards/accuracies" in entry)
    assert before < 0.5
    assert re.fullmatch(rf"held-out agreement with the judge {after:.2f} in \d+ s", line), line


class TestScorer:
    def scorer(self, algorithm, **settings):
        trainer, config = _classes(algorithm)
        return load_scorer(parse_settings(NEEDED | settings, config)[0], trainer)

    def test_numbers_in_lists_are_numbers(self):
        _, args = parse_settings(NEEDED | {"reward_funcs": "r", "alpha": ["1e-5", "2e-5"]}, slipstream.XPOConfig)
        assert args.alpha == [1e-5, 2e-5]

    def test_one_of_ours(self):
        assert load_judge("RewardFunctionJudge").__name__ == "RewardFunctionJudge"
        with pytest.raises(ValueError, match="did you mean 'OpenAIPairwiseJudge'"):
            load_judge("OpenAIPairwiseJudg")
        with pytest.raises(ValueError, match="unknown judge: 'BasePairwiseJudge'"):
            load_judge("BasePairwiseJudge")

    def test_a_judge_in_a_file(self, judge):
        made = self.scorer("nash-md", judge=judge, judge_kwargs={"at_least": 3})["judge"]
        assert made.at_least == 3
        with pytest.raises(ValueError, match=r"judge: .*judge\.py has no class 'Other'"):
            load_judge(judge.replace("Digits", "Other"))
        with pytest.raises(ValueError, match=r"judge_kwargs of Digits: 'at_leest' \(did you mean 'at_least'"):
            self.scorer("nash-md", judge=judge, judge_kwargs={"at_leest": 3})
        with pytest.raises(ValueError, match="judge_kwargs lacks function, which RewardFunctionJudge needs"):
            self.scorer("nash-md", judge="RewardFunctionJudge")

    def test_a_reward_function_as_judge_is_named_like_any_other(self, tmp_path):
        (tmp_path / "reward.py").write_text("def short(completions, **_):\n    return [-len(c) for c in completions]\n")
        file = tmp_path / "reward.py"
        made = self.scorer("xpo", judge="RewardFunctionJudge", judge_kwargs={"function": f"{file}:short"})["judge"]
        assert made.judge(["?", "?"], [("long", "a"), ("b", "long")]) == [1, 0]
        wrong = {
            f"{file}:long": r"judge_kwargs\['function'\]: '.*reward.py:long': .* has no function 'long'",
            "acuracy_reward": "did you mean 'accuracy_reward'",
            "some/reward-model": "'some/reward-model' is not a function",
            5: r"judge_kwargs=\{'function': 5\}: RewardFunctionJudge does not take them: 5 is not a callable",
        }
        for given, message in wrong.items():
            with pytest.raises(ValueError, match=message):
                self.scorer("xpo", judge="RewardFunctionJudge", judge_kwargs={"function": given})

    def test_what_is_no_judge(self, tmp_path):
        (tmp_path / "judge.py").write_text("class Prefers:\n    pass\n\ndef prefers():\n    return 0\n")
        for name in ("Prefers", "prefers"):
            with pytest.raises(ValueError, match=rf"judge='.*:{name}' is not a class of judges: .*BasePairwiseJudge"):
                self.scorer("xpo", judge=f"{tmp_path / 'judge.py'}:{name}")

    def test_an_argument_of_the_wrong_type_is_one_line(self, judge, settings):
        done = slipstream_command("xpo", "--config", settings, "--judge", "OpenAIPairwiseJudge", "--judge_kwargs",
                                  "{system_prompt: 5, api_key: k}")  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith("slipstream xpo: judge_kwargs={'system_prompt': 5")
        assert "Traceback" not in done.stderr

    def test_rewards_and_a_judge(self, judge):
        with pytest.raises(ValueError, match="are both given: set one"):
            self.scorer("xpo", judge=judge, reward_funcs="accuracy_reward")

    def test_rloo_takes_no_judge(self, judge):
        with pytest.raises(ValueError, match="RLOOTrainer takes no judge"):
            self.scorer("rloo", judge=judge)

    def test_one_of_them_is_needed(self):
        with pytest.raises(ValueError, match="reward_funcs is missing"):
            self.scorer("xpo")
