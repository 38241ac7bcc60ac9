"""The quickstart's own command, cut short: what it prints, what it leaves, and that others can load it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

ROOT = Path(__file__).parents[2]
# vLLM as anyone would use it, in a process of its own.
ASK_VLLM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, kv_cache_memory_bytes=16 << 20, max_model_len=64)
    prompt = {"prompt_token_ids": json.loads(sys.argv[2])}
    print("IDS", list(llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    command = [
        sys.executable, "-m", "slipstream", "grpo", "--config", "examples/quickstart/grpo.yaml", "--output_dir",
        str(folder), "--max_steps", "4", "--logging_steps", "2", "--eval_steps", "4",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_it_says_what_happens(run):
    _, output = run
    assert "Completions at step" in output
    assert re.search(r"step 0 .*held-out", output)
    assert re.search(r"tokens/s .*generate \d+%", output)


def test_its_last_line_is_the_result(run):
    _, output = run
    line = output.strip().splitlines()[-1]
    found = re.fullmatch(r"held-out accuracy (0\.\d\d) -> ([01]\.\d\d) in \d+ s", line)
    assert found, line
    assert 0.20 <= float(found[1]) <= 0.40


def test_it_leaves_a_report_that_needs_no_network(run):
    page = (run[0] / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page.split("<script")[0])
    assert "Held-out" in page


def test_the_saved_model_answers_alike_in_transformers_and_vllm(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = run
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 47 + 38?"}], add_generation_prompt=True, return_dict=False
    )
    answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8)[0, len(ids) :].tolist()
    script = folder / "ask.py"
    script.write_text(ASK_VLLM)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(ids)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"IDS {answer}" in done.stdout


def test_with_a_server_nothing_is_left_when_it_is_told_to_end(tmp_path):
    command = [sys.executable, "examples/quickstart/with_server.py", "--output_dir", str(tmp_path)]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = []
    try:
        deadline = time.monotonic() + 240
        while len(started) < 3:  # the server, its replica, the trainer
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)  # between two looks at other processes
            started = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(signal.SIGTERM)
        assert running.wait(180) == 128 + signal.SIGTERM
        assert not psutil.wait_procs(started, timeout=60)[1]
    finally:
        running.kill()
        for process in started:
            if process.is_running():
                process.kill()
