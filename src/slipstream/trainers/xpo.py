"""Exploratory Preference Optimization (https://arxiv.org/abs/2405.21046)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.config import option
from slipstream.generation.engine import OnFinished, Request, Sampling
from slipstream.modeling.logprobs import PolicyOutput
from slipstream.objectives.pairwise import exploration_bonus, step_mean
from slipstream.records import Completion, MicroBatch
from slipstream.trainers import schedule
from slipstream.trainers.metrics import Tally
from slipstream.trainers.online_dpo import OnlineDPOConfig
from slipstream.trainers.pairwise import PairwiseTrainer


@dataclass
class XPOConfig(OnlineDPOConfig):
    """Configuration of `XPOTrainer`: Online DPO's, and the weight of the exploration bonus."""

    alpha: list[float] = option([1e-5], "Weight of the exploration bonus; a list: one value an epoch.")

    def _check_values(self) -> None:
        super()._check_values()
        self.alpha = schedule.checked("alpha", self.alpha, least=0)

    @property
    def samples_from_reference(self) -> bool:
        """The second completion is the reference's."""
        return True


class XPOTrainer(PairwiseTrainer):
    """Exploratory Preference Optimization (https://arxiv.org/abs/2405.21046): the policy's completion y is compared
    with one of the reference, y', by DPO's loss, and a bonus moves probability away from what the reference would
    have written anyway.

    Arguments are those of `PairwiseTrainer`. Metrics of rewards and lengths are those of y.

    Example:
        ```python
        args = XPOConfig("out", use_vllm=True)
        trainer = XPOTrainer("Qwen/Qwen3-0.6B", reward_funcs=accuracy_reward, args=args, train_dataset=dataset)
        trainer.train()
        ```
    """

    config_class = XPOConfig
    args: XPOConfig
    own_rows = slice(None, None, 2)

    def ask_engine(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """y of the policy and y' of the reference: no prompt has both before the end."""
        return self.ask_with_reference(requests, sampling, 1.0)

    def tally_samples(self, tally: Tally, scores_R: Tensor | None, ended_R: Tensor, counts_R: Tensor) -> None:
        """Scores of either side, and by how much the policy's are higher."""
        counts_P = counts_R[0::2]
        tally.mean("val/model_contain_eos_token", ended_R[0::2], counts_P)
        tally.mean("val/ref_contain_eos_token", ended_R[1::2], counts_P)
        if scores_R is not None:
            tally.mean("objective/model_scores", scores_R[0::2], counts_P)
            tally.mean("objective/ref_scores", scores_R[1::2], counts_P)
            tally.mean("objective/scores_margin", scores_R[0::2] - scores_R[1::2], counts_P)

    def objective(self, output: PolicyOutput, batch: MicroBatch, tally: Tally) -> Tensor:  # type: ignore[override]
        """DPO's loss and the bonus, a mean over the pairs that were judged."""
        pairs, alpha = self.pairs(output, batch), schedule.present(self.args.alpha, self.epoch)
        dpo_P = self.preference_loss(pairs, self.beta, tally)
        bonus_P = exploration_bonus(pairs.logps_B[1::2], alpha)
        tally.mean("loss/dpo", dpo_P, pairs.counts_P)
        tally.mean("loss/xpo", bonus_P, pairs.counts_P)
        tally.mean("judgements/won", pairs.first_P, pairs.counts_P)
        tally.mean("alpha", torch.full((), alpha, device=dpo_P.device))
        return step_mean(dpo_P + bonus_P, pairs.counts_P, batch.totals.kept_rows / 2, batch.totals.ranks)
