"""The command line: settings from YAML and options, reward functions by name, datasets from folders."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from datasets import Dataset

from slipstream import GRPOConfig
from slipstream.commands.loading import load_datasets, load_reward_function
from slipstream.commands.outcome import conclude
from slipstream.commands.train import _says_what_to_do, parse_settings, read_settings
from slipstream.version import __version__

NEEDED = {"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": "accuracy_reward", "output_dir": "o"}


def slipstream(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "slipstream", *map(str, arguments)], capture_output=True, text=True, timeout=600
    )


def test_the_version():
    assert slipstream("--version").stdout == f"{__version__}\n"


class TestSettings:
    def test_options_override_the_file(self, tmp_path):
        file = tmp_path / "run.yaml"
        file.write_text("learning_rate: 1e-5\nmax_steps: 3\n")
        settings = read_settings(file, ["--max-steps", "7", "--temperature=0.5", "--use_vllm", "--beta", "0.1"])
        assert settings == {
            "learning_rate": "1e-5", "max_steps": 7, "temperature": 0.5, "use_vllm": True, "beta": 0.1,
        }  # fmt: skip

    def test_values_reach_the_right_config(self):
        run, args = parse_settings(NEEDED | {"learning_rate": "1e-5", "dtype": "bfloat16"}, GRPOConfig)
        assert run.reward_funcs == ["accuracy_reward"]
        assert args.learning_rate == 1e-5
        assert args.model_init_kwargs == {"dtype": "bfloat16"}

    def test_a_bare_no_is_a_strategy(self):
        _, args = parse_settings(NEEDED | read_settings(None, ["--eval_strategy", "no"]), GRPOConfig)
        assert args.eval_strategy == "no"

    @pytest.mark.parametrize(
        "name", ["max_steps", "per_device_train_batch_size", "logging_steps", "learning_rate", "top_k"]
    )
    def test_a_word_is_no_number(self, name):
        with pytest.raises(ValueError, match=f"{name}='many' is not allowed: it must be a number"):
            parse_settings(NEEDED | {name: "many"}, GRPOConfig)

    def test_the_runs_own_numbers(self):
        assert parse_settings(NEEDED | {"lora_dropout": "1e-2"}, GRPOConfig)[0].lora_dropout == 0.01
        with pytest.raises(ValueError, match="lora_r='sixteen' is not allowed: it must be a number"):
            parse_settings(NEEDED | {"lora_r": "sixteen"}, GRPOConfig)

    def test_a_misspelt_setting_is_named(self):
        with pytest.raises(ValueError, match=r"'num_generation' \(did you mean 'num_generations'\?\)"):
            parse_settings(NEEDED | {"num_generation": 4}, GRPOConfig)

    @pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name", "reward_funcs"])
    def test_what_a_run_needs_is_asked_for(self, name):
        with pytest.raises(ValueError, match=f"{name} is missing: .*--{name}"):
            parse_settings({k: v for k, v in NEEDED.items() if k != name}, GRPOConfig)

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            read_settings(tmp_path / "none.yaml", [])

    def test_a_stray_word_is_an_error(self):
        with pytest.raises(ValueError, match=r"unexpected argument 'fast'.*lists as"):
            read_settings(None, ["fast"])


class TestRewardNames:
    def test_one_of_ours(self):
        assert load_reward_function("accuracy_reward").__name__ == "accuracy_reward"

    def test_a_file(self, tmp_path):
        file = tmp_path / "mine.py"
        file.write_text("def good(completions, **_):\n    return [1.0] * len(completions)\n")
        assert load_reward_function(f"{file}:good")(["a"]) == [1.0]
        with pytest.raises(ValueError, match="has no function 'bad'"):
            load_reward_function(f"{file}:bad")
        with pytest.raises(ValueError, match="there is no file"):
            load_reward_function(f"{tmp_path}/other.py:good")

    def test_a_file_is_run_once_and_is_a_module(self, tmp_path):
        file = tmp_path / "mine.py"
        file.write_text(
            "from __future__ import annotations\nimport dataclasses, pickle\n"
            "@dataclasses.dataclass\nclass Seen:\n    calls: int = 0\nseen = Seen()\n"
            "def one(completions, **_):\n    seen.calls += 1\n    return pickle.loads(pickle.dumps(seen)).calls\n"
            "def two(completions, **_):\n    return one(completions)\n"
        )
        one, two = (load_reward_function(f"{file}:{name}") for name in ("one", "two"))
        assert (one([]), two([]), one([])) == (1, 2, 3)
        broken = tmp_path / "broken.py"
        broken.write_text("1 / 0\n")
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                load_reward_function(f"{broken}:one")

    def test_a_module(self):
        assert load_reward_function("json.dumps") is json.dumps
        with pytest.raises(ValueError, match="module json has no function 'reward'"):
            load_reward_function("json.reward")

    def test_a_model(self):
        assert load_reward_function("someone/reward-model") == "someone/reward-model"

    def test_a_misspelt_one(self):
        with pytest.raises(ValueError, match="did you mean 'accuracy_reward'"):
            load_reward_function("acuracy_reward")


class TestDatasets:
    def write(self, folder, *splits):
        for split in splits:
            (folder / f"{split}.jsonl").write_text(json.dumps({"prompt": split, "solution": "1"}) + "\n")
        return parse_settings(NEEDED | {"dataset_name": str(folder)}, GRPOConfig)[0]

    def test_a_folder_of_splits(self, tmp_path):
        train, test = load_datasets(self.write(tmp_path, "train", "test"), evaluates=True)
        assert (train[0]["prompt"], test[0]["prompt"]) == ("train", "test")

    def test_the_test_split_is_read_only_if_it_is_used(self, tmp_path):
        config = self.write(tmp_path, "train")
        assert load_datasets(config, evaluates=False)[1] is None
        with pytest.raises(ValueError, match="there is no 'test' split"):
            load_datasets(config, evaluates=True)

    def test_splits_of_different_kinds(self, tmp_path):
        config = self.write(tmp_path, "train")
        Dataset.from_list([{"prompt": "parquet"}]).to_parquet(str(tmp_path / "test.parquet"))
        train, test = load_datasets(config, evaluates=True)
        assert (train[0]["prompt"], test[0]["prompt"]) == ("train", "parquet")

    def test_a_file_of_another_kind(self, tmp_path):
        file = tmp_path / "rows.txt"
        file.write_text("a\n")
        config = parse_settings(NEEDED | {"dataset_name": str(file)}, GRPOConfig)[0]
        with pytest.raises(ValueError, match=r"rows\.txt' is a file of an unknown kind: give one that ends in \.jsonl"):
            load_datasets(config, evaluates=False)


class TestConclusion:
    def conclude(self, capsys, *entries, binary=True):
        return self.last_line(capsys, [(s, {"eval_rewards/right/mean": v}) for s, v in entries], ["right"], binary)

    def last_line(self, capsys, logged, names, binary=False, equals=False):
        trainer = SimpleNamespace(
            rewards=SimpleNamespace(names=names), rewards_are_binary=binary,
            compares_equals=lambda args: equals,
            state=SimpleNamespace(
                log_history=[{"step": s, "eval_loss": 0.0, **values} for s, values in logged], num_input_tokens_seen=9
            ),
            args=SimpleNamespace(output_dir="out", html_report=False),
        )  # fmt: skip
        conclude(trainer, 12.3, steps=20)
        return capsys.readouterr().out.splitlines()[-1]

    def test_before_and_after(self, capsys):
        assert self.conclude(capsys, (0, 0.25), (10, 0.5), (20, 0.75)) == "held-out accuracy 0.25 -> 0.75 in 12 s"
        line = self.conclude(capsys, (0, 0.2), (20, 0.7), binary=False)
        assert line == "held-out reward (right) 0.20 -> 0.70 in 12 s"

    def test_an_evaluation_after_training_alone_is_not_a_before(self, capsys):
        assert self.conclude(capsys, (20, 0.75)) == "held-out accuracy 0.75 in 12 s"
        assert self.conclude(capsys, (10, 0.5), (20, 0.75)) == "held-out accuracy 0.75 in 12 s"

    def test_by_a_judge(self, capsys):
        both = [(0, {"eval_rewards/accuracies": 0.0}), (20, {"eval_rewards/accuracies": 0.75})]
        assert self.last_line(capsys, both, []) == "held-out agreement with the judge 0.75 in 12 s"
        assert self.last_line(capsys, both, [], equals=True) == "trained 20 steps in 12 s"
        won = [(s, values | {"eval_judgements/won": 0.5}) for s, values in both]
        assert self.last_line(capsys, won, []) == "held-out win rate against the reference 0.50 -> 0.50 in 12 s"

    def test_without_an_evaluation(self, capsys):
        assert self.conclude(capsys) == "trained 20 steps in 12 s"


class TestProgram:
    def test_help_is_there_and_light(self):
        done = slipstream("--help")
        assert done.returncode == 0
        assert "grpo" in done.stdout
        assert "env" in done.stdout

    def test_every_setting_can_be_listed(self):
        done = slipstream("grpo", "--fields")
        assert done.returncode == 0
        for name in ("model_name_or_path", "vllm_gpu_memory_utilization", "epsilon_high", "learning_rate"):
            assert name[:12] in done.stdout

    def test_a_wrong_setting_is_one_line_not_a_traceback(self, tmp_path):
        done = slipstream("grpo", "--output_dir", tmp_path, "--temperature", -1, "--model_name_or_path", "m",
                          "--dataset_name", "d", "--reward_funcs", "accuracy_reward")  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith("slipstream grpo: temperature=-1 is not allowed")
        assert "Traceback" not in done.stderr

    def test_a_dry_run_checks_and_stops(self, tmp_path):
        (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a", "solution": "1"}) + "\n")
        done = slipstream("grpo", "--dry-run", "--output_dir", tmp_path, "--model_name_or_path", "m",
                          "--dataset_name", tmp_path, "--reward_funcs", "accuracy_reward")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "1 training rows" in done.stdout

    @pytest.mark.parametrize(
        ("row", "options", "message"),
        [
            ({"question": "a"}, [], "train_dataset has no column 'prompt'"),
            ({"prompt": "a"}, ["--reward_weights", "[1, 2]"], "reward_weights has 2 values for 1 reward_funcs"),
            ({"prompt": "a"}, ["--num_generations", 4], "train_dataset has 1 rows, but one generation batch needs 2"),
            ({"prompt": "a"}, ["--fsdp", "true", "--fsdp_config", '{"version": 1}'], "FSDP version 1 is not supported"),
        ],
    )
    def test_a_dry_run_checks_what_the_trainer_would(self, tmp_path, row, options, message):
        (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
        done = slipstream("grpo", "--dry-run", "--output_dir", tmp_path, "--model_name_or_path", "m",
                          "--dataset_name", tmp_path, "--reward_funcs", "accuracy_reward", *options)  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith(f"slipstream grpo: {message}")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"question": "a"}, "train_dataset has no column 'prompt'; its columns are 'question'"),
            ({"prompt": "a"}, "model='/nowhere/model': no tokenizer of that folder or name can be loaded"),
        ],
    )
    def test_what_shows_when_the_trainer_is_made_is_one_line_too(self, tmp_path, row, message):
        (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
        done = slipstream("grpo", "--output_dir", tmp_path, "--model_name_or_path", "/nowhere/model", "--use_cpu",
                          "--dataset_name", tmp_path, "--reward_funcs", "think_format_reward")  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith(f"slipstream grpo: {message}")
        assert "Traceback" not in done.stderr

    def test_what_others_raise_keeps_its_traceback(self):
        for raising, ours in ((lambda: GRPOConfig(temperature=-1), True), (lambda: json.loads("{"), False)):
            with pytest.raises(ValueError) as e:
                raising()
            assert _says_what_to_do(e.value) is ours
