"""The README's Python example runs, on a tiny model and rows that need no network."""

from __future__ import annotations

import re
from pathlib import Path

import datasets

README = Path(__file__).parents[2] / "README.md"
SUMS = [(a, b) for a in range(4) for b in range(4)]
ROWS = [{"prompt": [{"role": "user", "content": f"{a}+{b}=?"}], "solution": str(a + b)} for a, b in SUMS]


def test_the_example_trains(tiny_model, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(ROWS))
    smaller = (
        f"output_dir={str(tmp_path)!r}, max_steps=1, max_completion_length=8, vllm_max_model_length=64, report_to=[], "
        'save_strategy="no", disable_tqdm=True'
    )
    code = code.replace('"Qwen/Qwen2.5-0.5B-Instruct"', repr(str(tiny_model))).replace('output_dir="out"', smaller)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 1
    assert trainer.engine.version == 0, "vLLM sampled with the weights it was sent"
    trainer.close()
