"""`slipstream vllm-serve`: options from the command line and a YAML file, checked; then the server runs."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from slipstream.checks import known_names
from slipstream.serving.settings import RENAMED, Settings

CONTEXT = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "token_normalize_func": lambda name: name.replace("_", "-"),  # --max_model_len is --max-model-len
}
# vLLM's, of those that are in use.
SHORT = {
    "-tp": "--tensor-parallel-size", "-dp": "--data-parallel-size", "-pp": "--pipeline-parallel-size",
    "-q": "--quantization",
}  # fmt: skip
_ENGINE_NAMES = (
    "import json; from slipstream import vllm_compat; print(json.dumps(sorted(vllm_compat.server_option_names())))"
)


class Command(typer.core.TyperCommand):
    """A command with vLLM's short names, whose switches may be followed by their value: `--enforce-eager true`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Rewrite `--x true` as `--x`, and `--x false` as `--no-x`, where x is one of our switches; and short names."""
        switches = {f"--{field.name.replace('_', '-')}" for field in options() if "bool" in str(field.type)}
        plain, rest = [], list(args)
        while rest:
            name, given, value = rest.pop(0).partition("=")
            name = SHORT.get(name, name)
            if name.replace("_", "-") not in switches:
                plain.append(name + given + value)
                continue
            if not given and rest and rest[0].lower() in ("true", "false"):
                value = rest.pop(0)
            plain.append(f"--no-{name[2:]}" if value.lower() == "false" else name)
        return super().parse_args(ctx, plain)


def command() -> Callable[..., None]:
    """The command's function, with an option for each of the settings, and `--config`."""

    def vllm_serve(context: typer.Context, config: Path | None, **given: Any) -> None:
        """Serve a model to trainers: completions out, weights in. Options that vLLM's engine knows are passed on."""
        from slipstream.serving.launch import serve

        try:
            settings = read(config, {name: v for name, v in given.items() if v is not None}, context.args)
            serve(settings)
        except (ValueError, OSError, RuntimeError) as error:
            sys.exit(f"slipstream vllm-serve: {error}")

    types = typing.get_type_hints(Settings)
    parameters = [
        ("context", typer.Context, inspect.Parameter.empty),
        ("config", Annotated[Path | None, typer.Option(help="YAML file with options; the command line wins.")], None),
    ]
    for field in options():
        shown = typer.Option(
            "--" + field.name.replace("_", "-"),  # without typer's --no-x beside it, which `read` understands
            help=_help(field),
            rich_help_panel=field.metadata["panel"],
            show_default=False,
        )
        # None tells an option that was not given from one that was given its default.
        parameters.append((field.name, Annotated[types[field.name] | None, shown], None))
    kind = inspect.Parameter.KEYWORD_ONLY
    vllm_serve.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind, annotation=type_, default=default) for name, type_, default in parameters]
    )
    vllm_serve.__annotations__ = {name: type_ for name, type_, _ in parameters}
    return vllm_serve


def _help(field: dataclasses.Field[Any]) -> str:
    if field.default is None:
        return field.metadata["help"]  # says what happens by default
    default = "off" if field.default is False else field.default
    return f"{field.metadata['help']} ({'required' if default == '' else f'default: {default}'})"


def options() -> list[dataclasses.Field[Any]]:
    """The fields of `Settings` that are options of the command."""
    return [field for field in dataclasses.fields(Settings) if "panel" in field.metadata]


def read(config: Path | None, given: dict[str, Any], further: list[str]) -> Settings:
    """The settings of a YAML file and of the command line, which wins.

    Args:
        config: The YAML file.
        given: Options of ours from the command line.
        further: Other words of the command line: options of vLLM's engine.

    Raises:
        ValueError: a setting is unknown, or its value is not allowed.
        FileNotFoundError: there is no such file.
    """
    from slipstream.commands.train import read_settings

    ours = {field.name for field in options()}
    settings = nested({name.replace("-", "_"): value for name, value in read_settings(config, further).items()})
    words = [word.replace("-", "_") for word in further]
    if both := [name for name in given if any(word.startswith(f"__{name}.") for word in words)]:
        raise ValueError(f"{', '.join(both)} is given both as a whole and in parts: leave one out.")
    settings = positive(settings, ours) | given
    engine = {name: settings.pop(name) for name in list(settings) if name not in ours}
    if engine:
        engine = engine_options(engine, ours)
    for field in options():
        if field.name in settings and "str" in str(field.type) and isinstance(settings[field.name], int | float):
            settings[field.name] = str(settings[field.name])  # YAML reads a folder named 7 as a number
    return Settings(**settings, engine_options=engine)


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` with `a.b: 1` as `a: {b: 1}`, beside what else `a` holds.

    Raises:
        ValueError: `a` has a value without parts, or `b` is no name.
    """
    whole = {name: value for name, value in settings.items() if "." not in name}
    for name in [name for name in settings if name not in whole]:
        shown = f"--{name.replace('_', '-')}"
        *path, last = name.split(".")
        if not all((*path, last)) or last.endswith("+"):
            raise ValueError(f"{shown} is not allowed: parts have names, and lists are given as a whole.")
        place = whole
        for part in path:
            inner = place.get(part)
            if not isinstance(inner, dict | None):
                raise ValueError(f"{shown}: {part}={inner!r} has no parts.")
            place[part] = inner = dict(inner or {})
            place = inner
        place[last] = settings[name]
    return whole


def positive(settings: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """`settings` with `no_x: True` as `x: False`, where `x` is known."""
    negated = {name: name.removeprefix("no_") for name in settings if name.startswith("no_") and name not in known}
    negated = {name: plain for name, plain in negated.items() if plain in known}
    return {negated.get(name, name): name not in negated and value for name, value in settings.items()}


def engine_options(settings: dict[str, Any], ours: set[str]) -> dict[str, Any]:
    """`settings`, if vLLM's engine knows them all; `no_x` is `x: False` among them.

    Raises:
        ValueError: it does not know one, or the option has another name here.
    """
    known = engine_option_names() - ours
    named = positive(settings, known)
    for name in named:
        if name in RENAMED:
            raise ValueError(f"--{name.replace('_', '-')} is --{RENAMED[name].replace('_', '-')} here.")
    if "api_key" in named:
        raise ValueError("--api-key would show the key to all users of this machine: set SLIPSTREAM_API_KEY instead.")
    known_names("option", named, [*known, *ours])
    return named


def engine_option_names() -> set[str]:
    """Names of vLLM's engine options, asked of a process of its own: the server imports neither torch nor vLLM.

    Raises:
        RuntimeError: vLLM cannot be imported.
    """
    asked = subprocess.run(
        [sys.executable, "-c", _ENGINE_NAMES], capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    if asked.returncode:
        raise RuntimeError(f"vLLM's options cannot be listed: {(asked.stderr.strip() or 'no output').splitlines()[-1]}")
    return set(json.loads(asked.stdout.splitlines()[-1]))
