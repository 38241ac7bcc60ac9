"""`slipstream grpo --config run.yaml`: one implementation for every trainer."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# Two runtimes share the cores when vLLM generates on the CPU: threads that spin while they wait take them from the
# other one. OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import yaml

from slipstream.checks import known_names
from slipstream.commands.loading import load_datasets, load_scorer
from slipstream.commands.outcome import conclude, evaluated_last
from slipstream.lifetime import leave_process_group

NUMBERS = {form.format(kind) for kind in ("int", "float") for form in ("{}", "{} | None", "<class '{}'>")}


@dataclasses.dataclass
class RunConfig:
    """What a run needs besides its trainer's configuration; names as in other command lines of the field."""

    model_name_or_path: str = dataclasses.field(
        default="", metadata={"help": "The model to train: a name or a folder."}
    )
    model_revision: str | None = dataclasses.field(default=None, metadata={"help": "Branch, tag or commit of it."})
    dtype: str | None = dataclasses.field(default=None, metadata={"help": "Type of its weights (default: float32)."})
    attn_implementation: str | None = dataclasses.field(default=None, metadata={"help": "Its attention code."})
    dataset_name: str = dataclasses.field(
        default="", metadata={"help": "A dataset's name, a folder with train.jsonl and test.jsonl, or a file."}
    )
    dataset_config: str | None = dataclasses.field(default=None, metadata={"help": "Its configuration."})
    dataset_train_split: str = dataclasses.field(default="train", metadata={"help": "The split to train on."})
    dataset_test_split: str = dataclasses.field(default="test", metadata={"help": "The split to evaluate on."})
    reward_funcs: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": "Names of slipstream.rewards, file.py:function, module.function, or reward models."},
    )
    judge: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "In the place of reward_funcs (online-dpo, nash-md, xpo): a class of slipstream.judges, or "
            "file.py:Class."
        },
    )
    judge_kwargs: dict[str, Any] | None = dataclasses.field(default=None, metadata={"help": "Its arguments."})
    use_peft: bool = dataclasses.field(default=False, metadata={"help": "Train a LoRA adapter."})
    lora_r: int = dataclasses.field(default=16, metadata={"help": "Its rank."})
    lora_alpha: int = dataclasses.field(default=32, metadata={"help": "Its scale."})
    lora_dropout: float = dataclasses.field(default=0.05, metadata={"help": "Its dropout."})
    lora_target_modules: list[str] | None = dataclasses.field(default=None, metadata={"help": "Modules it adapts."})


def run(algorithm: str, config: Path | None, options: list[str], *, list_fields: bool, dry_run: bool) -> None:
    """Train as `config` and the command line say, save the model, and report the held-out accuracy.

    Raises:
        SystemExit: a setting is wrong; the message says which and what is allowed.
    """
    trainer_class, config_class = _classes(algorithm)
    if list_fields:
        _print_fields(config_class)
        return
    try:
        settings = read_settings(config, options)
        run_config, args = parse_settings(settings, config_class)
        scorer = load_scorer(run_config, trainer_class)
        train, test = load_datasets(run_config, evaluates=args.eval_strategy != "no" or args.eval_on_start)
    except (ValueError, NotImplementedError, FileNotFoundError) as error:
        sys.exit(f"slipstream {algorithm}: {error}")
    try:
        if dry_run:
            from slipstream.trainers import preflight

            given = args, run_config.model_name_or_path, train, test
            preflight.check(*given, scorer.get("reward_funcs"), judge=scorer.get("judge"))
            print(f"{len(train)} training rows, {len(test) if test is not None else 0} test rows; settings are valid.")
            return
        trainer = trainer_class(
            model=run_config.model_name_or_path,
            **scorer,
            args=args,
            train_dataset=train,
            eval_dataset=test,
            peft_config=_adapter(run_config),
        )
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if not _says_what_to_do(error):
            raise
        sys.exit(f"slipstream {algorithm}: {error}")
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if test is not None and not evaluated_last(trainer):
        trainer.evaluate()
    seconds = time.perf_counter() - started
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        conclude(trainer, seconds, steps=trainer.state.global_step)
    trainer.close()
    leave_process_group()


def _says_what_to_do(error: Exception) -> bool:
    """Whether it was raised by this package, whose errors need no traceback to be understood."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "slipstream"


def _classes(algorithm: str) -> tuple[Any, Any]:
    import slipstream

    names = {"grpo": "GRPO", "rloo": "RLOO", "online-dpo": "OnlineDPO", "nash-md": "NashMD", "xpo": "XPO"}
    name = names[algorithm]
    return getattr(slipstream, f"{name}Trainer"), getattr(slipstream, f"{name}Config")


def read_settings(config: Path | None, options: list[str]) -> dict[str, Any]:
    """The settings of the YAML file, overridden by `--field value` and `--field=value`."""
    settings: dict[str, Any] = {}
    if config is not None:
        if not config.is_file():
            raise FileNotFoundError(f"--config {config}: there is no such file.")
        try:
            loaded = yaml.safe_load(config.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"--config {config} is not YAML: {error}") from error
        if not isinstance(loaded, dict):
            raise ValueError(f"--config {config}: it must hold `field: value` lines, not a {type(loaded).__name__}.")
        settings |= loaded
    remaining = list(options)
    while remaining:
        name = remaining.pop(0)
        if not name.startswith("--"):
            raise ValueError(
                f"unexpected argument {name!r}: settings are given as `--field value`, and lists as `--field '[a, b]'`."
            )
        name, given, text = name[2:].partition("=")
        if not given:
            # A flag without a value is true, as in `--bf16`.
            text = remaining.pop(0) if remaining and not remaining[0].startswith("--") else "true"
        settings[name.replace("-", "_")] = _value(name, text)
    return settings


def _value(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--{name} {text!r} cannot be read as YAML ({reason}): put a text with such signs into quotes of its own, "
            f"as in --{name} '\"...\"'."
        ) from error


def parse_settings(settings: dict[str, Any], config_class: Any) -> tuple[RunConfig, Any]:
    """Split settings into the run's and the trainer's; numbers in YAML such as 1e-5 (a string there) are converted."""
    run_fields = {f.name: f for f in dataclasses.fields(RunConfig)}
    trainer_fields = {f.name: f for f in dataclasses.fields(config_class) if f.init}
    known_names("settings", settings, [*run_fields, *trainer_fields])
    own = {
        name: _as_declared(name, value, str(run_fields[name].type))
        for name, value in settings.items()
        if name in run_fields
    }
    if isinstance(own.get("reward_funcs"), str):
        own["reward_funcs"] = [own["reward_funcs"]]
    run_config = RunConfig(**own)
    for name in ("model_name_or_path", "dataset_name", "reward_funcs"):
        if not getattr(run_config, name) and not (name == "reward_funcs" and run_config.judge):
            raise ValueError(f"{name} is missing: give it in the --config file or as --{name}.")
    passed = {
        name: _as_declared(name, value, str(trainer_fields[name].type))
        for name, value in settings.items()
        if name not in own
    }
    init = dict(passed.get("model_init_kwargs") or {})
    for name, value in (
        ("revision", run_config.model_revision),
        ("dtype", run_config.dtype),
        ("attn_implementation", run_config.attn_implementation),
    ):
        if value is not None:
            init[name] = value
    if init:
        passed["model_init_kwargs"] = init
    return run_config, config_class(**passed)


def _as_declared(name: str, value: Any, annotation: str) -> Any:
    """What YAML reads otherwise than a setting means it: `1e-5` is a string there, and a bare `no` is false."""
    if isinstance(value, list):
        return [_as_declared(name, one, annotation) for one in value]
    if isinstance(value, str) and "float" in annotation and "str" not in annotation:
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, str) and annotation in NUMBERS:
        # transformers would stumble over it somewhere, without its name.
        raise ValueError(f"{name}={value!r} is not allowed: it must be a number.")
    if value is False and "Strategy" in annotation:
        return "no"
    return value


def _adapter(config: RunConfig) -> Any:
    if not config.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        task_type="CAUSAL_LM",
    )


def _print_fields(config_class: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("setting", "default", "meaning", title=f"Settings of {config_class.__name__}")
    for source in (RunConfig, config_class):
        for field in sorted(dataclasses.fields(source), key=lambda f: f.name):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            help = " ".join(str(field.metadata.get("help", "")).split())
            table.add_row(field.name, str(default), help[:200])
    Console().print(table)
