"""The `slipstream` command. Commands load what they need when they run, so that --help is instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slipstream import version
from slipstream.commands import vllm_serve

app = typer.Typer(
    help="Train language models on their own completions, with vLLM doing the generating.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Fields of the configuration are options too: `--learning_rate 1e-5` and `--learning-rate=1e-5`.
FREE_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version.__version__)
        raise typer.Exit


@app.callback()
def _slipstream(
    show: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    pass


TRAINERS = {
    "grpo": "Train with GRPO.",
    "rloo": "Train with RLOO.",
    "online-dpo": "Train with Online DPO.",
    "nash-md": "Train with Nash-MD.",
    "xpo": "Train with XPO.",
}


def _add_trainer(algorithm: str, title: str) -> None:
    def train(
        context: typer.Context,
        config: Annotated[Path | None, typer.Option(help="YAML file with the run's settings.")] = None,
        fields: Annotated[
            bool, typer.Option("--fields", help="List every setting with its default, and exit.")
        ] = False,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the settings and the data, and exit.")] = False,
    ) -> None:
        from slipstream.commands.train import run

        run(algorithm, config, context.args, list_fields=fields, dry_run=dry_run)

    help = f"{title} Any setting of the YAML file can be given or overridden as `--field value`."
    app.command(algorithm, help=help, context_settings=FREE_OPTIONS)(train)


for _algorithm, _title in TRAINERS.items():
    _add_trainer(_algorithm, _title)


app.command("vllm-serve", cls=vllm_serve.Command, context_settings=vllm_serve.CONTEXT)(vllm_serve.command())


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Print versions, devices and settings of this machine, for a bug report."""
    from slipstream.commands.env import env as report

    report(as_json)
