"""What the settings of a run name: reward functions, judges, datasets."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipstream.checks import known_names

if TYPE_CHECKING:
    from slipstream.commands.train import RunConfig

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_scorer(config: RunConfig, trainer_class: Any) -> dict[str, Any]:
    """The trainer's argument that says which completions are good: `reward_funcs` or `judge`.

    Raises:
        ValueError: there is no such function or judge, both are given, the trainer takes no judge, or the judge takes
            no such arguments.
    """
    from slipstream.judges import BasePairwiseJudge, RewardFunctionJudge

    if config.judge is None:
        return {"reward_funcs": [load_reward_function(name) for name in config.reward_funcs]}
    if config.reward_funcs:
        raise ValueError(f"reward_funcs={config.reward_funcs!r} and judge={config.judge!r} are both given: set one.")
    if "judge" not in inspect.signature(trainer_class.__init__).parameters:
        raise ValueError(f"judge={config.judge!r}: {trainer_class.__name__} takes no judge, give reward_funcs.")
    judge, options = load_judge(config.judge), dict(config.judge_kwargs or {})
    if not (inspect.isclass(judge) and issubclass(judge, BasePairwiseJudge)):
        raise ValueError(
            f"judge={config.judge!r} is not a class of judges: it must be a subclass of "
            "slipstream.judges.BasePairwiseJudge."
        )
    parameters = inspect.signature(judge).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        known_names(f"judge_kwargs of {judge.__name__}", options, parameters)
    missing = [
        name for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and name not in options
    ]  # fmt: skip
    if missing:
        raise ValueError(f"judge_kwargs lacks {', '.join(missing)}, which {judge.__name__} needs.")
    if issubclass(judge, RewardFunctionJudge) and isinstance(options["function"], str):
        options["function"] = _judging_function(options["function"])
    try:
        return {"judge": judge(**options)}
    except (TypeError, AttributeError, ImportError) as error:
        raise ValueError(
            f"judge_kwargs={config.judge_kwargs!r}: {judge.__name__} does not take them: {error}"
        ) from error


def load_judge(name: str) -> Any:
    """A judge's class: `OpenAIPairwiseJudge` is one of `slipstream.judges`, `path/to/file.py:Class` is yours.

    Raises:
        ValueError: there is no such class.
    """
    from slipstream import judges

    if ".py:" in name:
        return _from_file("judge", name, "class")
    known_names("judge", [name], [one for one in judges.__all__ if not inspect.isabstract(getattr(judges, one))])
    return getattr(judges, name)


def _judging_function(name: str) -> Any:
    setting = "judge_kwargs['function']"
    function = load_reward_function(name, setting)
    if isinstance(function, str):
        raise ValueError(
            f"{setting}: {name!r} is not a function: give one of slipstream.rewards, file.py:function or "
            "module.function. (A reward model goes into reward_funcs.)"
        )
    return function


def load_reward_function(name: str, setting: str = "reward_funcs") -> Any:
    """A reward function by its name, or the name itself when it is a model's.

    `accuracy_reward` is one of `slipstream.rewards`; `path/to/file.py:function` and `package.module.function` are
    yours; anything else is taken for a sequence-classification model.

    Args:
        name: The function.
        setting: Where it was given, for messages.

    Raises:
        ValueError: the file or module has no such function.
    """
    from slipstream import rewards

    if ".py:" in name:
        return _from_file(setting, name, "function")
    if name in rewards.__all__:
        return getattr(rewards, name)
    parent, _, function = name.rpartition(".")
    if parent and "/" not in name and not Path(name).exists() and importlib.util.find_spec(parent.split(".")[0]):
        module = importlib.import_module(parent)
        if not hasattr(module, function):
            raise ValueError(f"{setting}: {name!r}: module {parent} has no function {function!r}.")
        return getattr(module, function)
    if "/" not in name and not Path(name).exists():
        known_names("reward function", [name], rewards.__all__)
    return name


def _from_file(setting: str, name: str, kind: str) -> Any:
    path, _, wanted = name.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"{setting}: {name!r}: there is no file {path}.")
    module = _module_of(Path(path).resolve())
    if not hasattr(module, wanted):
        raise ValueError(f"{setting}: {name!r}: {path} has no {kind} {wanted!r}.")
    return getattr(module, wanted)


def _module_of(path: Path) -> Any:
    """The module of a file, which is run once: what it loads is there once, whatever of it is asked for."""
    # Dataclasses and pickle look for it under its name.
    name = f"slipstream_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_datasets(config: RunConfig, *, evaluates: bool) -> tuple[Any, Any]:
    """The training rows, and the test rows if there are any and they are asked for."""
    from datasets import load_dataset

    path = Path(config.dataset_name)
    splits = [config.dataset_train_split, *([config.dataset_test_split] if evaluates else [])]
    if not path.exists():
        loaded = load_dataset(config.dataset_name, config.dataset_config)
        known_names(f"split of dataset {config.dataset_name!r}", splits, list(loaded))
        return loaded[splits[0]], loaded[splits[1]] if evaluates else None
    files = {}
    for split in splits:
        found = [path] if path.is_file() else [p for p in sorted(path.glob(f"{split}.*")) if p.suffix in FORMATS]
        if not found or (path.is_file() and split != splits[0]):
            raise ValueError(
                f"dataset_name={config.dataset_name!r}: there is no {split!r} split ({split}.jsonl, .json, .csv or "
                ".parquet). Set dataset_train_split and dataset_test_split, or eval_strategy: 'no'."
            )
        if found[0].suffix not in FORMATS:
            raise ValueError(
                f"dataset_name={config.dataset_name!r} is a file of an unknown kind: give one that ends in "
                f"{', '.join(FORMATS)}."
            )
        files[split] = str(found[0])
    # Each by itself: they may be of different kinds.
    rows = [load_dataset(FORMATS[Path(f).suffix], data_files=f, split="train") for f in files.values()]
    return rows[0], rows[1] if evaluates else None
