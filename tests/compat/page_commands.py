"""Checks the commands of a page without running what takes long: programs, files and options are there."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from accelerate.commands.launch import launch_command_parser
from blocks import Block
from typer.testing import CliRunner

from slipstream.commands import vllm_serve
from slipstream.commands.main import TRAINERS, app

# Files that a page leaves to its reader.
OF_THE_READER = ("train.py", "run.yaml")


def words_of(line: str) -> list[str]:
    """The words of a command line, the program's name first: without its folder, and without variables before it."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"\w+=", words[0]):
        words.pop(0)
    return [Path(words[0]).name, *words[1:]] if words else [""]


def check_commands(block: Block) -> None:
    """Each line is a command that is there, with options that it has."""
    for line in block.text.replace("\\\n", " ").splitlines():
        program, *words = words_of(line)
        if program:
            assert program in COMMANDS, f"{block}: nobody knows how to check {line!r}"
            COMMANDS[program](words)


def check_make(words: list[str]) -> None:
    variables = {word.partition("=")[0]: word.partition("=")[2] for word in words if "=" in word}
    assert set(variables) <= set(re.findall(r"(?m)^(\w+) \?=", Path("Makefile").read_text()))
    assert_there(shlex.split(variables.get("ARGS", "")))
    done = subprocess.run(["make", "-n", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def check_slipstream(words: list[str]) -> None:
    name, *options = words
    if name == "vllm-serve":
        command = typer.main.get_command(app).commands[name]
        if "--help" in options:
            assert {option for parameter in command.params for option in parameter.opts} >= {"--model", "--reference"}
            return
        with command.make_context(name, options) as context:
            given = {key: value for key, value in context.params.items() if value is not None}
            assert vllm_serve.read(given.pop("config", None), given, context.args).model
        return
    checked = name in TRAINERS and "--fields" not in options
    # Some examples are for a GPU, whose bfloat16 transformers looks for.
    done = CliRunner().invoke(app, [*words, "--dry-run", "--use_cpu=true"] if checked else words)
    assert done.exit_code == 0, done.output
    assert not checked or "settings are valid" in done.output


def check_python(words: list[str]) -> None:
    """The script is there, and knows the options of the line. (In this process, which has loaded torch already.)"""
    script, *options = words
    assert_there([script])
    if script in OF_THE_READER:
        return
    assert "parse_args(" in Path(script).read_text(), f"{script} would run for --help"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [script, "--help"])
        patch.setattr(sys, "path", [str(Path(script).resolve().parent), *sys.path])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 0
    assert {option for option in options if option.startswith("--")} <= set(re.findall(r"--[\w-]+", printed.getvalue()))


def check_accelerate(words: list[str]) -> None:
    assert words.pop(0) == "launch"
    assert_there([launch_command_parser().parse_args(words).training_script])


def check_pip(words: list[str]) -> None:
    """The project is installed from its folder, with extras that it has."""
    assert words.pop(0) == "install"
    extras = set(tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"])
    for word in words:
        if not word.startswith("-"):
            project = re.fullmatch(r"\.\[([\w,-]+)\]", word)
            assert project, word
            assert set(project[1].split(",")) <= extras


def check_pytest(words: list[str]) -> None:
    markers = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    if words[0] == "-m":
        assert words[1] in [marker.partition(":")[0] for marker in markers]
        words = words[2:]
    assert_there(words)


def check_pre_commit(words: list[str]) -> None:
    assert words == ["install"]
    assert importlib.util.find_spec("pre_commit")
    assert_there([".pre-commit-config.yaml"])


def assert_there(words: list[str]) -> None:
    """Those that are no options are files."""
    for word in words:
        assert word.startswith("-") or Path(word).exists(), word


COMMANDS = {
    "make": check_make, "slipstream": check_slipstream, "python": check_python, "accelerate": check_accelerate,
    "pip": check_pip, "pytest": check_pytest, "pre-commit": check_pre_commit,
}  # fmt: skip
