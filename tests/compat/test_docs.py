"""Every code block of the pages is run or checked, and so is every command in a line of text.

A block of a kind that nobody knows fails: teach `KINDS` or `COMMANDS` what to do with it, or skip it with a reason.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
import yaml
from blocks import ROOT, Block, blocks_of, pages
from page_commands import COMMANDS, OF_THE_READER, check_commands, words_of
from serving.servers import start_server

FORMULAS = "a formula: tests/unit compares the objectives with it, written a second time"
# Of these sections, blocks without a language.
SKIPPED = {
    ("docs/design.md", "Server mode"): "a picture of processes",
    ("docs/trainers/grpo.md", "What it computes"): FORMULAS,
    ("docs/trainers/rloo.md", "What it computes"): FORMULAS,
    ("docs/trainers/online_dpo.md", "What it computes"): FORMULAS,
    ("docs/trainers/nash_md.md", "What it computes"): FORMULAS,
    ("docs/trainers/xpo.md", "What it computes"): FORMULAS,
}
BLOCKS = [block for path in pages() for block in blocks_of(str(path.relative_to(ROOT)), path.read_text())]
# Commands in a line of text; one without options, such as `slipstream vllm-serve`, is a name and nothing to run.
INLINE = [
    Block(str(path.relative_to(ROOT)), number, "", "sh", span)
    for path in pages()
    for number, line in enumerate(path.read_text().splitlines(), 1)
    for span in re.findall(r"`((?:make|python|pip|slipstream \S+) [^`]+)`", line)
]
SUMS = [(a, b) for a in range(4) for b in range(4)]
ROWS = [{"prompt": [{"role": "user", "content": f"{a}+{b}=?"}], "solution": str(a + b)} for a, b in SUMS]
RESULT = re.compile(r"held-out accuracy [01]\.\d\d -> [01]\.\d\d in \d+ s")


def kind_of(block: Block) -> str:
    """What is done with a block: one of `KINDS`, or `skipped`."""
    if (block.page, block.section) in SKIPPED and not block.language:
        return "skipped"
    if block.language in ("bash", "sh") or (not block.language and words_of(block.text.splitlines()[0])[0] in COMMANDS):
        return "commands"
    if block.language in ("python", "diff"):
        return block.language
    if not block.language and RESULT.fullmatch(block.text):
        return "result"
    raise AssertionError(f"{block}: nobody knows what to do with a block {block.language!r} that begins so:\n"
                         f"{block.text[:200]}")  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The repository as its reader has it, with what the pages leave to the reader and what the examples make."""
    folder = tmp_path_factory.mktemp("home")
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".git", ".venv"):
            (folder / path.name).symlink_to(path)
    for name in OF_THE_READER:
        (folder / name).touch()
    run = {"model_name_or_path": "m", "dataset_name": "runs/smollm2/data", "reward_funcs": "accuracy_reward",
           "output_dir": "runs/mine"}  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    data = folder / "runs" / "smollm2" / "data"
    data.mkdir(parents=True)
    enough = 16 * ROWS  # for a generation batch of the examples
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in enough))
    return folder


@pytest.fixture(scope="module")
def server(tiny_model):
    started = start_server(tiny_model)
    yield started
    started.stop()


@pytest.fixture
def run_python(tiny_model, tmp_path, monkeypatch, request):
    """A function that runs a block on a tiny model, rows that need no network, and a server on a free port."""
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(ROWS))
    smaller = (
        f"output_dir={str(tmp_path)!r}, max_steps=1, max_completion_length=8, report_to=[], save_strategy='no', "
        "disable_tqdm=True, html_report=False"
    )

    def run(block: Block) -> None:
        model = request.getfixturevalue("tiny_vision_model") if '"image":' in block.text else tiny_model
        if "tools=" in block.text or "environment_factory=" in block.text:
            model = request.getfixturevalue("calling_model")  # whose chat template shows them
        code = re.sub(r'model="[\w.-]+/[\w.-]+"', f"model={str(model)!r}", block.text)
        code = code.replace('output_dir="out"', smaller)
        if "server_port=8000" in code:
            server = request.getfixturevalue("server")
            monkeypatch.setenv("SLIPSTREAM_API_KEY", server.key)
            code = code.replace("server_port=8000", f"server_port={server.port}")
        names: dict = {}
        exec(compile(code, str(block), "exec"), names)
        made = set(names) - {"__builtins__"}
        assert made
        if "trainer" in made:
            trainer = names["trainer"]
            try:
                assert trainer.state.global_step == 1
                assert trainer.args.use_vllm == ("use_vllm=True" in block.text)
                assert trainer.engine.version == 0, "the engine sampled with the weights it was sent"
            finally:
                trainer.close()
        if "answer" in made:
            assert [0 < len(ids) <= 8 for ids in names["answer"]["completion_ids"]] == [True, True]

    return run


def check_diff(block: Block) -> None:
    """Imports of a script, before and after: `trl` is replaced, and what comes of it can be imported."""
    before, after = ([line[1:] for line in block.text.splitlines() if line.startswith(sign)] for sign in ("-", "+"))
    assert before
    assert [line.replace("trl", "slipstream") for line in before] == after
    exec("\n".join(after), {})


def check_result(block: Block) -> None:
    """What a run has printed is said the same way in the README's table."""
    assert f"| {block.text}" in (ROOT / "README.md").read_text()


KINDS = {"diff": check_diff, "result": check_result, "commands": check_commands}


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_runs(block, run_python):
    run_python(block)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language != "python"] + INLINE, ids=str)
def test_everything_else_is_checked(block, home, monkeypatch):
    monkeypatch.chdir(home)
    kind = kind_of(block)
    assert kind == "skipped" or KINDS[kind](block) is None


def test_every_page_is_read_and_every_exception_is_needed():
    assert {Path(block.page).parts[0] for block in BLOCKS} == {"README.md", "CONTRIBUTING.md", "docs", "examples"}
    assert {(block.page, block.section) for block in BLOCKS if kind_of(block) == "skipped"} == set(SKIPPED)
    assert {kind_of(block) for block in BLOCKS} == {"skipped", "python", *KINDS}


@pytest.mark.parametrize(
    "text",
    [
        "```ruby\nputs 1\n```",
        "```\nheld-out accuracy: better\n```",
        "An indented one:\n\n    cargo build",
        "```bash\nmake test\ncargo build\n```",
        "```bash\nslipstream vllm-serve --port 8000\n```",
        "    slipstream grpo --config run.yaml --no_such_field 1",
        "    slipstream grpo --config examples/none.yaml",
        "    make no-such-target",
        "    make test PROCESSES=2",
        "    python examples/quickstart/pretrain.py --no-such-option",
        "    pip install '.[no-such-extra]'",
        "    accelerate launch --no_such_option train.py",
        "    pytest tests/none",
        "```diff\n-from trl import GRPOTrainer\n+from slipstream import GRPOConfig\n```",
        "```diff\n-from trl import SFTTrainer\n+from slipstream import SFTTrainer\n```",
    ],
)
def test_a_block_that_is_unknown_or_wrong_fails(text, home, monkeypatch):
    monkeypatch.chdir(home)
    [block] = blocks_of("page.md", text)
    with pytest.raises((AssertionError, ImportError, ValueError, SystemExit)):
        KINDS[kind_of(block)](block)


def test_blocks_are_found_where_they_stand():
    text = "# One\n\n    a\n\n      b\n\ntext\n    of a paragraph\n\n## Two\n\n  ```sh\n  c\n  ```\n"
    one, two = blocks_of("page.md", text)
    assert (str(one), one.section, one.language, one.text) == ("page.md:3", "One", "", "a\n\n  b")
    assert (str(two), two.section, two.language, two.text) == ("page.md:12", "Two", "sh", "c")
    with pytest.raises(ValueError, match=r"page\.md:1: this fence is never closed"):
        list(blocks_of("page.md", "```sh\nc\n"))
