"""The completion log across kills and resumes, and the console table under hostile text."""

from __future__ import annotations

import io
import json
import logging
import math

import pytest
from rich.console import Console

from slipstream.reporting import CompletionLog, CompletionRow, completions_table
from slipstream.reporting.text import clock, duration, number, shorten, visible


def row(step=1, completion="4", prompt="2 + 2 =", reward=1.0, advantage=0.5, **changes):
    values = {"length": 3, "truncated": False, "weight_version": step - 1, "mode": "train"} | changes
    return CompletionRow(step, prompt, completion, {"accuracy": reward}, advantage, **values)


@pytest.fixture
def log(tmp_path):
    return CompletionLog(tmp_path / "out" / "completions.jsonl")


def printed(table, width=120):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor")
    console.print(table)
    return console.file.getvalue()


# ---- log ------------------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were(log):
    rows = [
        row(1, 'line\nbreaks "quotes" \u2028 \x85 \x00 \x1b[31m 日本 😀', mode="eval"),
        row(2, "", reward=None, truncated=True),
        row(3, "a lone surrogate \ud83d stays", advantage=-1.25),
    ]
    log.append(rows[:1])
    log.append([])
    log.append(rows[1:])
    assert log.read() == rows
    assert CompletionLog(log.path).read() == rows
    assert len(log.path.read_bytes().splitlines()) >= 3
    assert json.loads(log.path.read_bytes().split(b"\n")[0])["mode"] == "eval"


def test_a_log_that_does_not_exist_is_empty(log):
    assert log.read() == []
    assert log.truncate_after(5) == 0
    assert not log.path.exists()


def test_not_a_number_survives(log):
    log.append([row(reward=math.nan, advantage=math.inf)])
    (back,) = log.read()
    assert math.isnan(back.rewards["accuracy"])
    assert back.advantage == math.inf


@pytest.mark.parametrize("cut", [1, 20, -2])
def test_a_torn_last_line_is_dropped_with_a_warning(log, cut, caplog):
    log.append([row(1), row(2)])
    data = log.path.read_bytes()
    second = data.index(b"\n") + 1
    end = second + cut if cut > 0 else len(data) + cut
    log.path.write_bytes(data[:end])
    resumed = CompletionLog(log.path)
    with caplog.at_level(logging.WARNING):
        assert resumed.read() == [row(1)]
    assert "torn" in caplog.text
    resumed.append([row(3)])
    assert resumed.read() == [row(1), row(3)]


def test_a_whole_last_line_that_lacks_only_its_newline_is_kept(log, caplog):
    log.append([row(1), row(2)])
    log.path.write_bytes(log.path.read_bytes()[:-1])
    resumed = CompletionLog(log.path)
    resumed.append([row(3)])
    assert resumed.read() == [row(1), row(2), row(3)]
    assert "torn" not in caplog.text


@pytest.mark.parametrize("damage", [b"{}\n", b"[1]\n", b"not json\n", b"\n", b'{"step": "one"}\n', b"\xff\xfe\n"])
def test_other_damage_is_an_error_that_names_the_line(log, damage):
    log.append([row(1)])
    with log.path.open("ab") as file:
        file.write(damage)
    log.append([row(3)])
    for act in (log.read, lambda: log.truncate_after(1)):
        with pytest.raises(ValueError, match=r"completions\.jsonl, line 2: not a completion row"):
            act()


def test_resuming_drops_later_steps_and_continues(log):
    log.append([row(step) for step in (1, 2, 3, 4)])
    with log.path.open("ab") as file:
        file.write(b'{"step": 5, "pro')
    resumed = CompletionLog(log.path)
    assert resumed.truncate_after(2) == 2
    resumed.append([row(3, "again")])
    assert resumed.read() == [row(1), row(2), row(3, "again")]
    assert resumed.truncate_after(-1) == 3
    assert resumed.read() == []
    assert [path.name for path in log.path.parent.iterdir()] == ["completions.jsonl"]


def test_fields_of_a_later_version_are_left_alone(log):
    log.append([row(1)])
    values = json.loads(log.path.read_bytes()) | {"tool_calls": 3}
    log.path.write_text(json.dumps(values) + "\n")
    assert log.read() == [row(1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"mode": "test"}, "mode is 'test'"), ({"length": 3.5}, "length is 3.5"), ({"prompt": [{}]}, "list")],
)
def test_a_row_refuses_what_it_cannot_hold(changes, message):
    with pytest.raises(ValueError, match=message):
        row(**changes)


# ---- table ----------------------------------------------------------------------------------------------------------


def test_the_table_has_a_column_a_reward_and_the_values():
    rows = [row(7, "four"), CompletionRow(7, "2 + 2 =", "five", {"accuracy": None, "format": 0.25}, -1.5, 1, True, 6)]
    table = completions_table(rows, 7)
    headers = [str(column.header) for column in table.columns]
    assert headers == ["Prompt", "Completion", "accuracy", "format", "Advantage"]
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    assert cells == [["2 + 2 =", ""], ["four", "five"], ["1", "–"], ["–", "0.25"], ["0.5", "-1.5"]]
    assert "Completions at step 7" in printed(table)


def test_an_empty_table_prints():
    assert "step 3" in printed(completions_table([], 3))


def test_markup_and_control_characters_of_a_model_do_nothing():
    hostile = "[bold red]x[/] [/nope] :smile: [link=http://x]y\x1b[2J\x1b]0;title\x07\x9b31m\r\u202eback\ud83d"
    name = "re[red]ward[/red]"
    text = printed(completions_table([CompletionRow(1, hostile, hostile, {name: 1.0}, 0.0, 1, False, 0)], 1), width=240)
    for piece in (
        "[bold red]x[/]",
        "[/nope]",
        ":smile:",
        "[link=http://x]y␛[2J␛]0;title␇",
        "\\x9b31m␍\\u202eback\\ud83d",
    ):
        assert piece in text
    assert name in text
    for character in ("\x1b[2J", "\x07", "\x9b", "\r", "\u202e", "\ud83d", "\x1b]"):
        assert character not in text
    text.encode()  # what reaches the terminal can be encoded


def test_newlines_are_visible_and_do_not_break_the_row():
    (cell,) = completions_table([row(completion="a\nb\tc\n")], 1).columns[1].cells
    assert cell.plain == "a↵b⇥c↵"


def test_long_text_keeps_its_beginning_and_end():
    (cell,) = (
        completions_table([row(completion="begin " + "x" * 5000 + " end")], 1, completion_chars=100).columns[1].cells
    )
    assert cell.plain.startswith("begin ")
    assert cell.plain.endswith(" end")
    assert " … " in cell.plain
    assert len(cell.plain) == 100


def test_the_table_fits_a_narrow_terminal():
    text = printed(completions_table([row(completion="word " * 40)], 1), width=60)
    plain = Console(file=io.StringIO(), width=60)
    plain.print(completions_table([row(completion="word " * 40)], 1))
    assert max(len(line) for line in plain.file.getvalue().splitlines()) <= 60
    assert "word" in text


# ---- words and numbers ----------------------------------------------------------------------------------------------


def test_numbers_for_people():
    cases = {
        0.0: "0",
        1.0: "1",
        0.3141: "0.314",
        12345.6: "12,346",
        2.1e-5: "2.1e-05",
        1_234_567.0: "1.23M",
        -3.5e9: "-3.5B",
        999.4: "999",
        -999.7: "-1,000",
        999_999.7: "1M",
        999.7e6: "1B",
        999.7e9: "1e+12",
    }
    assert {value: number(value) for value in cases} == cases
    assert [number(None), number(math.nan), number(-math.inf)] == ["–", "–", "-∞"]
    assert [duration(s) for s in (8.44, 142.3, 725, 12_000)] == ["8.4 s", "142 s", "12 min 05 s", "3 h 20 min"]
    assert [clock(s) for s in (None, 0, 3725.9)] == ["-:--:--", "0:00:00", "1:02:05"]


def test_shorten_and_visible():
    assert shorten("abc", 3) == "abc"
    assert shorten("a" * 50 + "b" * 50, 11) == "aaaa … bbbb"
    assert visible("a\nb\x1b", lines=True) == "a\nb␛"
