"""The `slipstream` command. Commands load what they need when they run, so that --help is instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Train language models on their own completions, with vLLM doing the generating.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Fields of the configuration are options too: `--learning_rate 1e-5` and `--learning-rate=1e-5`.
FREE_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=FREE_OPTIONS)
def grpo(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file with the run's settings.")] = None,
    fields: Annotated[bool, typer.Option("--fields", help="List every setting with its default, and exit.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the settings and the data, and exit.")] = False,
) -> None:
    """Train with GRPO. Any setting of the YAML file can be given or overridden as `--field value`."""
    from slipstream.commands.train import run

    run("grpo", config, context.args, list_fields=fields, dry_run=dry_run)


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Print versions, devices and settings of this machine, for a bug report."""
    from slipstream.commands.env import env as report

    report(as_json)
