"""What a checkpoint holds beside transformers' own files, so that a run goes on from it as if it had never stopped.

Each rank keeps its part in `slipstream_rank{r}.pt`. Transformers keeps weights, optimizer, scheduler, random states and
the log; which prompts come next and how completions are sampled follow from the configuration, so that is compared.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from slipstream.records import Prompt
from slipstream.reporting import CompletionRow
from slipstream.rollouts import stored
from slipstream.trainers.metrics import Metrics

if TYPE_CHECKING:
    from slipstream.trainers.base import OnlineTrainer

STATE = "trainer_state.json"
# Transformers' files that it would go on without.
NEEDED = ("optimizer", "scheduler", "scaler", "rng_state")
PLAN = (
    "seed", "data_seed", "shuffle_dataset", "num_generations", "per_device_train_batch_size",
    "gradient_accumulation_steps", "steps_per_generation",
)  # fmt: skip
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Resume(TrainerCallback):
    """Puts the state of a checkpoint in place when transformers has set its own up."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer
        self.state: dict[str, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Continue where the checkpoint was saved; nothing in a new run."""
        if self.state is not None:
            _restore(self.trainer, self.state)
            self.state = None


def part(folder: str | Path, rank: int) -> Path:
    """Where a rank keeps its part."""
    return Path(folder) / f"slipstream_rank{rank}.pt"


def clear(trainer: OnlineTrainer, folder: str | Path) -> None:
    """Make a checkpoint of an earlier run that is about to be overwritten invalid until the new one is complete."""
    part(folder, trainer.args.process_index).unlink(missing_ok=True)
    if trainer.args.should_save:
        (Path(folder) / STATE).unlink(missing_ok=True)


def save(trainer: OnlineTrainer, folder: str | Path) -> None:
    """Write this rank's part. Call it when the rank's other files are in `folder`."""
    args, target = trainer.args, part(folder, trainer.args.process_index)
    state = stored.plain({
        "world_size": args.world_size,
        "plan": _plan(trainer),
        "given": trainer.given_weights,
        "files": sorted(p.name for p in Path(folder).iterdir() if p.name.startswith(NEEDED)),
        "batch": trainer._batch and (trainer._batch[0], stored.pack(trainer._batch[1])),
        "metrics": trainer.metrics.values,
        # The losses since the last log, the sum of those before, and when that log was.
        "loss": (trainer._tr_loss, trainer._total_loss_scalar, trainer._globalstep_last_logged),
        "journal": [asdict(row) for row in trainer.journal.rows] if trainer.journal else [],
        "max_tokens": trainer.packer.max_tokens,
        "extra": trainer._extra_state(),
    }, "checkpoint")  # fmt: skip
    temporary = target.with_suffix(".tmp")
    with temporary.open("wb") as out:
        torch.save(state, out)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(target)


def read(trainer: OnlineTrainer, given: str | os.PathLike[str] | bool) -> tuple[str, dict[str, Any]]:
    """The folder of a checkpoint (`True`: the last one in output_dir) and this rank's part of it, checked.

    Raises:
        FileNotFoundError: there is no checkpoint, or a part of it is missing.
        ValueError: a part is damaged, or another run's: this one's next steps would not be those that it was at.
    """
    args = trainer.args
    found: Any = given
    if given is True:
        found = get_last_checkpoint(args.output_dir) if os.path.isdir(str(args.output_dir)) else None
    if found is None or not os.path.isdir(found):
        where = f"output_dir={args.output_dir!r} has no checkpoint" if given is True else "there is no such folder"
        raise FileNotFoundError(f"resume_from_checkpoint={given!r}: {where}.")
    folder = str(found)
    way_out = f"To start a new run from its weights alone, pass model={folder!r} and do not resume."
    own = part(folder, args.process_index)
    parts = [own] if own.is_file() else sorted(Path(folder).glob("slipstream_rank*.pt"))
    if not parts:
        raise FileNotFoundError(
            f"{own} is missing, so the run cannot be continued: the checkpoint was saved with save_only_model=True, by "
            f"another trainer, or not to its end. Resume from another one. {way_out}"
        )
    state = _load(parts[0], way_out)
    if state["world_size"] != args.world_size:
        raise ValueError(
            f"{folder} was saved by {state['world_size']} processes, but this run has {args.world_size}. Weights and "
            "optimizer could be divided anew, but each process has rollouts and random states of its own: start "
            f"{state['world_size']} processes. {way_out}"
        )
    for needed in (own, *(Path(folder) / name for name in (STATE, *state["files"]))):
        if not needed.exists():
            raise FileNotFoundError(f"{needed} is missing: the checkpoint is incomplete. {way_out}")
    try:
        json.loads((Path(folder) / STATE).read_text())
    except ValueError as error:
        raise ValueError(f"{Path(folder) / STATE} is damaged ({error}). {way_out}") from error
    _compare(state, trainer, folder, way_out)
    if state["batch"]:
        key, rollouts = state["batch"]
        made = stored.unpack(rollouts, lambda i: _prompt(trainer, i), args.device)
        state["batch"] = (key, made)
    return folder, state


def given_weights(policy: nn.Module, reference: nn.Module | None) -> dict[str, int | None]:
    """A number that follows from the bits of each model that a run needs but its checkpoints do not hold.

    Where a model is divided over ranks, from this rank's part.
    """
    frozen = [p for p in policy.parameters() if not p.requires_grad] if hasattr(policy, "disable_adapter") else None
    return {
        "the model below the adapter": None if frozen is None else _fingerprint(frozen),
        "the reference model": None if reference is None else _fingerprint(reference.parameters()),
    }


def _fingerprint(tensors: Iterable[Tensor]) -> int:
    total = 0
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        bits = local.detach().contiguous().view(_BITS[local.element_size()])
        total = (31 * total + int(bits.sum(dtype=torch.int64))) % 2**63
    return total


def _load(path: Path, way_out: str) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch trips over in a damaged file
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). {way_out}") from error


def _restore(trainer: OnlineTrainer, state: dict[str, Any]) -> None:
    trainer._batch = state["batch"]
    trainer.epoch = max(0, math.ceil(trainer.state.epoch or 0) - 1)
    trainer.metrics = Metrics(state["metrics"])
    loss, trainer._total_loss_scalar, trainer._globalstep_last_logged = state["loss"]
    trainer._tr_loss = loss.to(trainer.args.device)
    if trainer.journal:
        trainer.journal.resume([CompletionRow(**row) for row in state["journal"]])
    if trainer.args.max_tokens_per_micro_batch is None and state.get("max_tokens") is not None:
        # Measured anew it might be another, and other micro-batches round in another way.
        trainer.packer.max_tokens = state["max_tokens"]
        if trainer.is_world_process_zero():
            trainer.progress.console.print(f"max_tokens_per_micro_batch {state['max_tokens']} (as when the run began)")
    trainer._load_extra_state(state["extra"])


def _prompt(trainer: OnlineTrainer, index: int) -> Prompt:
    row: Any = trainer.train_dataset[index]  # type: ignore[index]
    if trainer.rollout_func is not None:
        return Prompt([], row, index, rendered=False)
    return trainer.renderer.render(row, index)


def _plan(trainer: OnlineTrainer) -> dict[str, Any]:
    """What prompts, seeds and the meaning of a step follow from."""
    rows = 0 if trainer.train_dataset is None else len(trainer.train_dataset)  # type: ignore[arg-type]
    plan = {name: getattr(trainer.args, name) for name in PLAN}
    return plan | {
        "num_iterations": trainer._iterations,
        "len(train_dataset)": rows,
        "reference model used": trainer._uses_reference(trainer.args),
    }


def _compare(state: dict[str, Any], trainer: OnlineTrainer, folder: str, way_out: str) -> None:
    now = _plan(trainer)
    differ = [f"{n}={now[n]!r} (saved: {v!r})" for n, v in state["plan"].items() if now[n] != v]
    if differ:
        raise ValueError(
            f"{folder} was saved by a run with other prompts or samples ahead: {', '.join(differ)}. "
            f"Use the saved values. {way_out}"
        )
    others = [name for name, value in trainer.given_weights.items() if state["given"][name] != value]
    if others:
        raise ValueError(
            f"{folder}: {' and '.join(others)}, which a checkpoint does not hold, differs from the run's. Pass the "
            f"model that it was started with. {way_out}"
        )
