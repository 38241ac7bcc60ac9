"""The HTML report: what it shows, what it leaves out, and that it stays one harmless file."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from slipstream.reporting import CompletionRow, figures, samples, write_report
from slipstream.reporting.figures import MAX_POINTS

HOSTILE = (
    "</script><script>document.title='pwned'</script><!--<script><img src=//x onerror=alert(1)>&lt; \u2028\u202e\x1b"
)


def history(steps=4):
    entries = [{"step": 0, "epoch": 0.0, "eval_reward": 0.3, "eval_rewards/accuracy/mean": 0.3}]
    for step in range(1, steps + 1):
        entries.append({
            "step": step, "epoch": step / steps, "loss": 0.1, "grad_norm": 1.0, "learning_rate": 1e-6,
            "reward": 0.2 * step, "reward_std": 0.1, "rewards/accuracy/mean": 0.2 * step, "rewards/format/mean": 1.0,
            "completions/mean_length": 50.0, "completions/min_length": 10, "completions/max_length": 90,
            "completions/clipped_ratio": 0.1, "frac_reward_zero_std": 0.5, "kl": 0.01, "entropy": 0.5,
            "clip_ratio/low_mean": 0.0, "clip_ratio/high_mean": 0.01, "clip_ratio/region_mean": 0.01,
            "sampling/importance_sampling_ratio/min": 0.9, "sampling/importance_sampling_ratio/mean": 1.0,
            "sampling/importance_sampling_ratio/max": 1.1, "sampling/sampling_logp_difference/mean": 1e-5,
            "sampling/sampling_logp_difference/max": 1e-4, "time/generate": 2.0, "time/score": 0.1, "time/train": 1.0,
            "time/sync": 0.1, "time/wait": 0.0, "sync/bytes": 4e6, "num_tokens": 1000.0 * step, "step_time": 4.0,
        })  # fmt: skip
    entries.append(
        {"step": steps, "eval_reward": 0.9, "eval_rewards/accuracy/mean": 0.9, "eval_completions/mean_length": 40.0}
    )
    entries.append({"step": steps, "train_runtime": 75.0, "train_loss": 0.1})
    return entries


def row(step=1, prompt="2 + 2 =", completion="4", reward=1.0, mode="train", **changes):
    values = {"advantage": 0.5, "length": 3, "truncated": False, "weight_version": step} | changes
    return CompletionRow(step, prompt, completion, {"accuracy": reward}, mode=mode, **values)


class Page(HTMLParser):
    """The page as a browser's parser sees it: elements with attributes, scripts, and text outside of scripts."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.scripts, self.text, self._inside = [], [], "", ""
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    @property
    def titles(self):
        return [figure["title"] for figure in self.data["figures"]]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    rows = [
        row(1),
        row(1, completion=HOSTILE, prompt=HOSTILE),
        row(2, reward=None, truncated=True),
        row(4, mode="eval"),
    ]
    config = {
        "learning_rate": 1e-6,
        "hub_token": "hf_abc",
        "model_init_kwargs": {"token": "hf_def", "dtype": "<i>bf16"},
    }
    config |= {"vllm_server_api_key": "sk-1", "eos_token": "<end>", "num_tokens": 7, "nothing": None}
    summary = {"accuracy_before": 0.31, "accuracy_after": 0.942, "duration": 142.4, "steps": 60, "model": "<b>tiny</b>"}
    returned = write_report(
        path, title=f"A run {HOSTILE}", history=history(), completions=rows, config=config, summary=summary
    )
    assert returned == path
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]
    return Page(path)


# ---- one file, no network, no injection -----------------------------------------------------------------------------


def test_nothing_is_loaded_from_anywhere(page):
    for tag, attributes in page.elements:
        assert "src" not in attributes, (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#"), (tag, attributes)
        assert tag not in ("link", "base", "iframe", "img", "object", "embed", "form")


def test_the_policy_forbids_requests_and_foreign_scripts(page):
    (policy,) = (a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    allowed = re.findall(r"'sha256-([^']+)'", rules["script-src"])
    assert "unsafe" not in rules["script-src"]
    assert len(page.scripts) == 3
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert hashes == allowed


def test_a_page_has_plotly_once(page):
    assert sum("plotly.js v" in script[:200] for script in page.scripts) == 1


def test_hostile_text_is_data(page):
    assert sum(tag == "script" for tag, _ in page.elements) == 3
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "</" not in page.scripts[0]
    assert "<" not in page.scripts[0]
    shown = page.data["browser"]["rows"][1]["c"]
    assert shown == HOSTILE.replace("\u2028", "\\u2028").replace("\u202e", "\\u202e").replace("\x1b", "␛")
    assert HOSTILE in page.text.replace("\r", "")  # the title, as text


def test_the_page_renders_completions_as_text_only(page):
    script = page.scripts[2]
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert sink not in script


def test_secrets_are_masked_and_other_settings_are_not(page):
    for secret in ("hf_abc", "hf_def", "sk-1"):
        assert secret not in page.text
    for setting in ("(hidden)", "<end>", "num_tokens", "<i>bf16", "None", "1e-06"):
        assert setting in page.text


# ---- content --------------------------------------------------------------------------------------------------------


def test_all_curves_are_there(page):
    assert page.titles == [
        "Reward", "Held-out accuracy", "Reward by function", "Completion length", "Truncated completions",
        "Groups without a signal", "KL divergence", "Sampling ratio", "Log-probability gap", "Clipped tokens",
        "Entropy", "Loss", "Gradient norm", "Learning rate", "Time per phase", "Throughput", "Weight sync",
    ]  # fmt: skip
    drawn = [a["data-figure"] for _, a in page.elements if "data-figure" in a]
    assert drawn == [str(i) for i in range(len(page.titles))]
    for section in ("learning", "policy", "time", "completions", "settings"):
        assert any(a.get("id") == section for _, a in page.elements)


def test_curves_hold_the_logged_values(page):
    named = {figure["title"]: figure for figure in page.data["figures"]}
    training, held_out = named["Reward"]["curves"]
    assert training["x"] == [1, 2, 3, 4]
    assert training["y"] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert training["low"] == pytest.approx([0.1, 0.3, 0.5, 0.7])
    assert training["high"] == pytest.approx([0.3, 0.5, 0.7, 0.9])
    assert (held_out["x"], held_out["y"]) == ([0, 4], [0.3, 0.9])
    (length, _) = named["Completion length"]["curves"]
    assert (length["low"], length["high"]) == ([10] * 4, [90] * 4)
    assert [curve["name"] for curve in named["Time per phase"]["curves"]] == [
        "generate",
        "score",
        "train",
        "sync",
        "wait",
    ]
    assert named["Throughput"]["curves"][0]["y"] == [250.0] * 4
    assert named["Held-out accuracy"]["percent"] is True
    assert "30% → 90%" in page.text


def test_the_head_shows_the_key_numbers(page):
    for piece in ("Held-out accuracy", "31%", "94.2%", "142 s", "60", "<b>tiny</b>"):
        assert piece in page.text


def test_without_a_summary_the_history_speaks(tmp_path):
    page = Page(write_report(tmp_path / "r.html", title="t", history=history(), completions=[]))
    for piece in ("Held-out reward", "0.3 → 0.9", "75 s", "Steps", "4,000"):
        assert piece in page.text
    assert "Settings" not in page.text
    assert "This run logged no completions." in page.text


def test_missing_metrics_leave_their_figures_out(tmp_path):
    entries = [
        {"step": 1, "reward": 0.5, "loss": None, "kl": math.nan},
        {"step": 2, "reward": math.inf},
        {"reward": 3.0},
    ]
    page = Page(write_report(tmp_path / "r.html", title="t", history=entries, completions=[row()]))
    assert page.titles == ["Reward"]
    (curve,) = page.data["figures"][0]["curves"]
    assert (curve["x"], curve["y"], curve["low"]) == ([1, 2], [0.5, None], None)


def test_an_empty_run_is_a_page_too(tmp_path):
    page = Page(write_report(tmp_path / "r.html", title="t", history=[], completions=[]))
    assert page.titles == []
    assert "This run logged no metrics to draw." in page.text


def test_preference_trainers_have_their_curves():
    entries = [
        {"step": 1, "objective/scores": 1.0, "rewards/chosen": 0.2, "rewards/rejected": 0.1, "objective/kl": 0.1}
    ]
    assert [figure.title for figure in figures.figures(entries)] == ["Scores", "Implicit rewards", "KL divergence"]


def test_nash_mds_metrics_are_called_what_they_are_there():
    names = ("chosen", "rejected", "margins", "accuracies", "probabilities")
    entries = [{"step": 1, "objective/kl": 0.1, "loss/kl": 0.1} | {f"rewards/{name}": 0.5 for name in names}]
    drawn = figures.figures(entries)
    assert [(figure.title, [curve.name for curve in figure.curves]) for figure in drawn] == [
        ("Win probability", ["training"]), ("Scores", ["policy", "opponent"]), ("KL divergence", ["KL"]),
    ]  # fmt: skip


def test_the_entropy_of_whole_completions_is_not_called_a_mean_over_tokens():
    (figure,) = figures.figures([{"step": 1, "objective/entropy": 40.0}])
    assert (figure.title, figure.note[:4]) == ("Entropy of completions", "Sum ")


def test_a_reward_that_is_no_share_is_not_called_accuracy():
    (figure,) = figures.figures([{"step": 1, "eval_rewards/cosine/mean": -0.5}])
    assert (figure.title, figure.percent) == ("Held-out rewards", False)


def test_each_of_several_evaluation_datasets_has_its_curves():
    metrics = {"loss": 0.1, "aux_loss": 0.1, "reward": 0.5, "rewards/accuracy/mean": 0.5}
    entries = [{"step": 1} | {f"eval_{d}_{name}": value for name, value in metrics.items()} for d in ("math", "code")]
    assert [(figure.title, [curve.name for curve in figure.curves]) for figure in figures.figures(entries)] == [
        ("Reward", ["held-out math", "held-out code"]),
        ("Held-out accuracy", ["accuracy (math)", "accuracy (code)"]),
    ]


def test_a_mean_of_other_rewards_than_0_and_1_is_not_called_accuracy(tmp_path):
    entries = [{"step": 1, "eval_rewards/accuracy/mean": 0.3}]
    for reward, title in ((0.6, "Held-out rewards"), (1.0, "Held-out accuracy"), (None, "Held-out accuracy")):
        rows = [row(), row(reward=reward, mode="eval")]
        page = Page(write_report(tmp_path / "r.html", title="t", history=entries, completions=rows))
        assert page.titles == [title]


# ---- long runs ------------------------------------------------------------------------------------------------------


def test_long_curves_are_thinned_and_keep_their_extremes():
    entries = [{"step": s, "loss": 100.0 if s == 3333 else 0.0, "reward": 1.0, "reward_std": 0.5} for s in range(5001)]
    reward, loss = figures.figures(entries)
    (curve,) = loss.curves
    assert MAX_POINTS // 2 * 0.8 <= len(curve.x) == len(curve.y) <= MAX_POINTS
    assert max(curve.high) == 100.0
    assert 0 < max(curve.y) < 100.0
    assert curve.x == sorted(curve.x)
    assert set(reward.curves[0].low) == {0.5}
    assert loss.thinned > 1
    (whole,) = figures.figures(entries[:MAX_POINTS])[1:]
    assert len(whole.curves[0].x) == MAX_POINTS
    assert whole.thinned == 1


def test_many_completions_are_cut_to_whole_steps_and_the_page_says_so(tmp_path):
    rows = [row(step, prompt=f"prompt {step}", completion=f"{i}") for step in range(500) for i in range(16)]
    page = Page(write_report(tmp_path / "r.html", title="t", history=[], completions=rows))
    shown = page.data["browser"]["rows"]
    steps = sorted({each["s"] for each in shown})
    assert samples.MAX_ROWS * 0.9 < len(shown) <= samples.MAX_ROWS
    assert len(shown) == 16 * len(steps)
    assert (steps[0], steps[-1]) == (0, 499)
    assert max(b - a for a, b in pairwise(steps)) <= 5
    sentence = f"This page carries {len(shown):,} of 8,000 completions, from {len(steps)} of 500 steps"
    assert sentence in page.text


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_step_that_is_too_large_alone_is_cut_short(steps):
    rows = [row(step, completion="x" * 5000) for step in range(steps) for _ in range(2500)]
    chosen = samples.samples(rows)
    assert {each["s"] for each in chosen["rows"]} >= {0, steps - 1}
    assert len(chosen["rows"]) <= samples.MAX_ROWS
    assert sum(len(each["c"]) for each in chosen["rows"]) <= samples.MAX_CHARS
    assert "This page carries" in chosen["left_out"]


def test_long_texts_lose_their_middle_and_the_page_says_so():
    chosen = samples.samples([row(completion="start " + "x" * 20_000 + " end")])
    text = chosen["rows"][0]["c"]
    assert len(text) == samples.MAX_TEXT
    assert text.startswith("start ")
    assert text.endswith(" end")
    assert chosen["left_out"] == "Texts over 8,000 characters are shortened in the middle."


def test_a_prompt_is_stored_once_and_broken_numbers_are_null():
    chosen = samples.samples([row(2), row(1, reward=math.nan, advantage=math.inf)])
    assert chosen["prompts"] == ["2 + 2 ="]
    assert [(each["s"], each["p"], each["r"], each["a"]) for each in chosen["rows"]] == [
        (1, 0, [None], None),
        (2, 0, [1.0], 0.5),
    ]
    assert chosen["left_out"] == ""


# ---- imports --------------------------------------------------------------------------------------------------------


def test_importing_the_package_is_free_and_tables_need_no_torch():
    script = (
        "import sys, slipstream.reporting as r;"
        "assert not {'torch', 'transformers', 'plotly', 'rich'} & set(sys.modules);"
        "from slipstream.reporting import CompletionLog, completions_table, write_report;"
        "assert not {'torch', 'transformers', 'plotly'} & set(sys.modules); assert 'ProgressReporter' in dir(r)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_attribute_errors():
    import slipstream.reporting

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        slipstream.reporting.nothing  # noqa: B018
