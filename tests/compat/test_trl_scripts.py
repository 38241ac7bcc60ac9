"""Scripts that were written for TRL run when `trl` is replaced in their import lines, and in nothing else."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from serving.servers import start_server

SCRIPTS = Path(__file__).parent / "scripts"
QUESTIONS = [{"question": f"{a}+{b}=?", "solution": str(a + b), "task": "math" if a % 2 else "other"}
             for a in range(6) for b in range(4)]  # fmt: skip


def converted(script: str) -> str:
    """The script with `slipstream` for `trl` in its import lines."""
    text, replaced = re.subn(r"(?m)^(\s*(?:from|import) )trl\b", r"\1slipstream", (SCRIPTS / script).read_text())
    assert replaced, f"{script} does not import trl"
    return text


@pytest.fixture
def run(tiny_model, tmp_path):
    """A function that converts a script, runs it in a process of its own, and returns what it printed."""

    def run_script(name: str, rows: list[dict[str, str]], *launcher: str, **variables: str) -> str:
        (tmp_path / name).write_text(converted(name))
        data = tmp_path / "data"
        data.mkdir()
        (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        places = {"MODEL": tiny_model, "DATASET": data, "OUTPUT": tmp_path / "out", "HF_HOME": tmp_path / "hf"}
        environment = os.environ | {k: str(v) for k, v in places.items()} | variables
        done = subprocess.run(
            [sys.executable, *launcher, name],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run_script


def history(folder: Path) -> list[dict[str, float]]:
    """The log that the run has saved."""
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_minimal(run, tmp_path):
    rows = [{"prompt": f"What is {r['question']}", "solution": r["solution"]} for r in QUESTIONS]
    run("minimal.py", rows)
    assert_saved(tmp_path / "out")
    assert "accuracy_reward" in (tmp_path / "out" / "report.html").read_text()
    completions = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").open()]
    assert {row["step"] for row in completions} == {1, 2}
    assert all(set(row["rewards"]) == {"accuracy_reward"} for row in completions)
    assert {row["weight_version"] for row in completions} == {0, 1}


@pytest.mark.slow
def test_custom_rewards(run, tmp_path):
    output = run("custom_rewards.py", QUESTIONS)
    assert_saved(tmp_path / "out")
    steps = [entry for entry in history(tmp_path / "out") if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    names = ("has_digits", "right_answer", "only_math", "slow_judge", "think_format_reward",
             "soft_overlong_punishment_reward")  # fmt: skip
    for entry in steps:
        means = [entry[f"rewards/{name}/mean"] for name in names]
        assert all(v is None or math.isfinite(v) for v in means)
        assert 0 <= entry["answered"] <= 1
        assert math.isfinite(entry["grad_norm"])
    assert "Completions at step 1" in output
    assert "gold" in output


@pytest.mark.slow
def test_peft_and_kl(run, tmp_path):
    run("peft_kl.py", QUESTIONS)
    out = tmp_path / "out"
    assert (out / "adapter_config.json").is_file()
    assert (out / "adapter_model.safetensors").is_file()
    entries = history(out / "checkpoint-4")
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert all(entry["kl"] >= 0 for entry in steps)
    # The second update of a generation batch is off-policy by one step.
    assert [entry["staleness/max"] for entry in steps] == [0, 1, 0, 1]
    assert [entry["step"] for entry in entries if "eval_reward" in entry] == [2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_server_and_launched_ranks(run, tiny_model, tmp_path, ranks):
    server = start_server(tiny_model)
    try:
        rows = [{"prompt": f"What is {r['question']}", "solution": r["solution"]} for r in QUESTIONS]
        # For GPUs the launcher sees by itself that there are several; on CPUs --multi_gpu says it.
        several = ("--multi_gpu", "--main_process_port", "0") if ranks > 1 else ()
        launcher = ("-m", "accelerate.commands.launch", "--num_processes", str(ranks), *several)
        places = {"PORT": str(server.port), "SLIPSTREAM_API_KEY": server.key}
        run("server.py", rows, *launcher, ACCELERATE_USE_CPU="true", **places)
    finally:
        server.stop()
    out = tmp_path / "out"
    assert_saved(out)
    states = {file.name for file in (out / "checkpoint-2").glob("rng_state*")}
    assert states == ({"rng_state.pth"} if ranks == 1 else {"rng_state_0.pth", "rng_state_1.pth"})
    # The first rank's rows; those of the second are in the metrics.
    versions = {json.loads(line)["weight_version"] for line in (out / "completions.jsonl").open()}
    assert versions == {0, 1}


def assert_saved(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert AutoTokenizer.from_pretrained(folder).chat_template
