"""What an algorithm brings to the loop that all trainers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from slipstream.config import OnlineConfig
from slipstream.judges import BasePairwiseJudge
from slipstream.modeling.logprobs import PolicyOutput
from slipstream.records import MicroBatch, Rollout
from slipstream.rollouts.custom import RolloutFunction
from slipstream.rollouts.dialogue import Dialogue
from slipstream.rollouts.tools import Toolbox
from slipstream.trainers.metrics import Tally


class Algorithm(Trainer):
    """The hooks of a trainer. `credit` and `objective` are every algorithm's own; the others have a default.

    Attributes:
        epoch: Of the optimizer step at hand, or of the last one; 0 is the first. (At an epoch's end `state.epoch` is
            that of the next one already, though what is evaluated then belongs to this one.)
        judge: Compares completions in the place of reward functions, or None.
        own_rows: Which rows of a prompt's completions the policy has sampled alone: the metrics of rewards and lengths
            are theirs.
        rollout_func: Samples in the place of the engine, or None.
        toolbox: The tools that the model may call, or None.
        dialogue: Reads the model's calls of them and writes their results; None where there are none.
        longest: Tokens that prompt and completion may have together, and whose limit that is; None: unknown.
        score_temperature: What logits are divided by when completions are scored; None: by what they were sampled with.
    """

    config_class: type[OnlineConfig] = OnlineConfig
    args: OnlineConfig
    epoch = 0
    judge: BasePairwiseJudge | None = None
    own_rows = slice(None)
    rollout_func: RolloutFunction | None = None
    toolbox: Toolbox | None = None
    dialogue: Dialogue | None = None
    longest: tuple[int, str] | None = None
    score_temperature: float | None = None

    def set_up(self) -> None:
        """Called when the models are there, before the engine starts; nothing by default."""

    def credit(self, rollouts: Sequence[Rollout], group_size: int, real: int) -> dict[str, float]:
        """Turn rewards into the `advantage` of every rollout; returns metrics.

        Called when rewards and the log-probabilities that are needed beforehand are there.

        Args:
            rollouts: This rank's rows, the `group_size` completions of a prompt side by side; every rank has equally
                many. A group may go on at the next rank.
            group_size: Completions of each prompt.
            real: How many rows of this rank count in metrics, from the first on; the others fill up.
        """
        raise NotImplementedError

    # (transformers has an attribute of this name that only its hyperparameter search uses.)
    def objective(self, output: PolicyOutput, batch: MicroBatch, tally: Tally) -> Tensor:  # type: ignore[override]
        """The loss of one micro-batch, normalized so that the micro-batches of an optimizer step add up.

        Gradients are averaged over ranks afterwards. Metrics go to `tally`.
        """
        raise NotImplementedError

    def prepare(self, model: nn.Module, rollouts: Sequence[Rollout]) -> None:
        """Called with this rank's rows of an optimizer step before it begins; nothing by default."""

    def learned(self, metrics: dict[str, float]) -> None:
        """Called with the metrics of an optimizer step when its gradients are there; nothing by default."""

    def scoring_options(self) -> dict[str, Any]:
        """Further arguments of `score_tokens` for the policy; none by default."""
        return {}

    def learns_from(self, rollouts: Sequence[Rollout]) -> Sequence[Rollout]:
        """The rows that go through the model; all by default."""
        return rollouts

    @property
    def keeps_groups(self) -> bool:
        """Whether the completions of a prompt have to be in the same micro-batch."""
        return False

    @property
    def needs_old_logps(self) -> bool:
        """Whether the policy that sampled has to be scored before the first optimizer step, as `old_logps`."""
        return False

    @staticmethod
    def _uses_reference(args: OnlineConfig) -> bool:
        """Whether log-probabilities under the reference are needed."""
        return bool(getattr(args, "beta", 0.0))

    @property
    def _iterations(self) -> int:
        """Times that a generation batch is replayed."""
        return 1

    def _extra_state(self) -> dict[str, Any]:
        """What else a subclass needs to continue a run: numbers, strings, lists, dicts and tensors.

        Every rank is asked at every checkpoint, and keeps its own answer.
        """
        return {}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `_extra_state` returned (tensors are on the CPU now), before the first step is continued."""

    def reward_table(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Rewards by function of this rank's rows, shape (rows, functions); NaN where one could not score a row."""
        table = [[torch.nan if v is None else v for v in r.rewards] for r in rollouts]
        return torch.tensor(table, dtype=torch.float32, device=self.accelerator.device)
