"""The pages of the trainers say what is true: fields, examples, and the metrics that a run logs."""

from __future__ import annotations

import importlib.util
import re
from itertools import product
from pathlib import Path

import datasets
import pytest

import slipstream
from slipstream.judges import BasePairwiseJudge
from slipstream.rewards import accuracy_reward

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
INDEX = DOCS / "trainers.md"
PAGES = {"GRPO": "grpo", "RLOO": "rloo", "OnlineDPO": "online_dpo", "NashMD": "nash_md", "XPO": "xpo"}
SUMS = list(product(range(4), repeat=2))
ROWS = [{"prompt": [{"role": "user", "content": f"{a}+{b}=?"}], "solution": str(a + b)} for a, b in SUMS]
SMALL = {
    "max_steps": 1, "logging_steps": 1, "max_completion_length": 8, "report_to": [], "save_strategy": "no",
    "disable_tqdm": True, "html_report": False,
}  # fmt: skip
# What transformers writes about a run, besides metrics.
OF_THE_LOG = {"step"}


def page(algorithm: str) -> Path:
    return DOCS / "trainers" / f"{PAGES[algorithm]}.md"


def code_of(path: Path) -> str:
    # Further ones, of a page's special sections, are run by tests/compat/test_docs.py.
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)[0]


def metrics_of(path: Path) -> dict[str, bool]:
    """Metrics that a page names, and whether every run has them."""
    (table,) = re.findall(r"\| metric \| \|\n\|---\|---\|\n((?:\|.*\n)+)", path.read_text())
    found = {}
    for line in table.splitlines():
        names, meaning = line.strip("|").split("|", 1)
        for name in re.findall(r"`(.*?)`", names):
            choices = [part.split(",") for part in re.findall(r"\{(.*?)\}", name)]
            form = re.sub(r"\{.*?\}", "{}", name).replace("<name>", "accuracy_reward")
            for chosen in product(*choices):
                found[form.format(*chosen)] = "Only " not in meaning
    return found


def test_every_trainer_has_a_page():
    trainers = {name.removesuffix("Trainer") for name in slipstream.__all__ if name.endswith("Trainer")}
    assert trainers == set(PAGES)
    index = INDEX.read_text()
    for algorithm in trainers:
        assert page(algorithm).exists()
        assert f"(trainers/{PAGES[algorithm]}.md)" in index
    pages = {path.stem for path in (DOCS / "trainers").glob("*.md")}
    assert pages == set(PAGES.values())


def test_tables_of_fields_are_the_configurations():
    spec = importlib.util.spec_from_file_location("trainer_docs", ROOT / "scripts" / "trainer_docs.py")
    trainer_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trainer_docs)
    for path in trainer_docs.PAGES:
        text = path.read_text()
        assert "<!-- fields: " in text, f"{path} has no table of fields"
        assert trainer_docs.written(text) == text, f"{path} is not up to date: .venv/bin/python scripts/trainer_docs.py"


@pytest.mark.parametrize("algorithm", PAGES)
def test_examples_run_and_log_the_metrics_of_their_page(algorithm, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(ROWS))
    options = ", ".join(f"{name}={value!r}" for name, value in SMALL.items())
    code = code_of(page(algorithm)).replace('"Qwen/Qwen2.5-0.5B-Instruct"', repr(str(tiny_model)))
    given = 'output_dir="out", use_vllm=True'
    assert given in code
    names: dict = {}
    exec(compile(code.replace(given, f"output_dir={str(tmp_path)!r}, {options}"), str(page(algorithm)), "exec"), names)
    trainer = names["trainer"]
    logged = set(trainer.state.log_history[0]) - OF_THE_LOG
    documented = metrics_of(page(algorithm)) | metrics_of(INDEX)
    trainer.close()
    assert logged <= set(documented), "these are not on the page"
    assert {name for name, always in documented.items() if always} <= logged, "these are on the page alone"


def test_the_example_of_a_judge(tiny_model, tmp_path):
    names: dict = {}
    exec(code_of(INDEX), names)
    judge = names["PrefersShort"]()
    assert isinstance(judge, BasePairwiseJudge)
    assert judge.probabilities(["?", "?"], [("a", "bb"), ("aa", "b")]) == [1.0, 0.0]
    trainer = slipstream.OnlineDPOTrainer(
        str(tiny_model), judge=judge, train_dataset=datasets.Dataset.from_list(ROWS),
        args=slipstream.OnlineDPOConfig(str(tmp_path), **SMALL),
    )  # fmt: skip
    trainer.train()
    logged = trainer.state.log_history[0]
    trainer.close()
    assert logged["judgements/failed"] == 0
    assert f"rewards/{accuracy_reward.__name__}/mean" not in logged
    without = re.findall(r"^\| (.*?) \|.*(?:Not with|Without) a judge", page("OnlineDPO").read_text(), re.MULTILINE)
    assert without
    assert not {name for cell in without for name in re.findall(r"`(.*?)`", cell)} & set(logged)
