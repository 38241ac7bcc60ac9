"""The migration page's lists are what is there, and what is not there says so."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from transformers import TrainingArguments

import slipstream
from slipstream import GRPOConfig, VLLMClient, rewards
from slipstream.experimental import judges

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
# Names in the left column that are not imported.
COLUMNS = {"IterableDataset"}


def rows(section: str) -> list[tuple[str, str]]:
    """The cells of a section's table."""
    (text,) = re.findall(rf"(?ms)^## {section}\n(.*?)(?=^## |\Z)", PAGE)
    lines = [
        line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| ") and line[2:3] != "|"
    ]
    return [(left, right) for left, right in lines]


def names(text: str) -> list[str]:
    return re.findall(r"`(\w+)`", text)


def same(title: str) -> list[str]:
    (right,) = [right for left, right in rows("The same") if left == title]
    return names(right)


LACKING = {name: left for left, _ in rows("Not there yet") for name in names(left)}
OF_THE_CLIENT = [name for name, left in LACKING.items() if "VLLMClient" in left]
OF_JUDGES = [name for name in LACKING if name.endswith("Judge")]
EXPORTS = set(LACKING) - COLUMNS - set(OF_THE_CLIENT) - set(OF_JUDGES)


def test_the_lists_of_what_is_there():
    assert all(callable(getattr(VLLMClient, name)) for name in same("Server mode") if not name.startswith("vllm"))
    assert set(same("Ready rewards")) <= set(rewards.__all__)
    assert {name for name in same("Judges") if name.endswith("Judge")} == set(judges.__all__) - {"BaseJudge"}
    (text,) = re.findall(r"Fields of `GRPOConfig` that only Slipstream has: (.*?)\. The", PAGE, re.DOTALL)
    ours = {field.name for field in dataclasses.fields(GRPOConfig)} - {
        f.name for f in dataclasses.fields(TrainingArguments)
    }
    assert len(names(text)) == 9
    assert set(names(text)) <= ours


@pytest.mark.parametrize("name", sorted(EXPORTS))
def test_what_cannot_be_imported(name):
    with pytest.raises(ImportError, match=rf"'{name}' from 'slipstream'"):
        exec(f"from slipstream import {name}", {})


@pytest.mark.parametrize("name", OF_JUDGES)
def test_a_judge_that_is_not_there_says_what_to_use(name):
    with pytest.raises(ImportError, match=rf"{name} is not in slipstream\.experimental\.judges\. \w+"):
        exec(f"from slipstream.experimental.judges import {name}", {})
    assert not hasattr(judges, "NoSuchJudge")
    with pytest.raises(ImportError, match="'NoSuchJudge' from 'slipstream"):
        exec("from slipstream.experimental.judges import NoSuchJudge", {})


def test_the_client_lacks_what_the_page_says():
    assert OF_THE_CLIENT
    assert not [name for name in OF_THE_CLIENT if name != "VLLMClient" and hasattr(VLLMClient, name)]


def test_the_exceptions_are_the_pages():
    assert len(LACKING) > 25
    assert {"SFTTrainer", "TrlParser", "LogCompletionsCallback", "apply_chat_template"} <= EXPORTS
    assert not EXPORTS & {*slipstream.__all__, *judges.__all__}
