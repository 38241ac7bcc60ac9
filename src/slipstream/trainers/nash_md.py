"""Nash-MD (https://arxiv.org/abs/2312.00886)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.config import option
from slipstream.generation.engine import OnFinished, Request, Sampling
from slipstream.modeling.logprobs import PolicyOutput
from slipstream.objectives.pairwise import nash_md_loss, step_mean
from slipstream.objectives.segments import row_sum
from slipstream.records import Completion, MicroBatch, Rollout
from slipstream.trainers import schedule
from slipstream.trainers.metrics import Tally
from slipstream.trainers.pairwise import PairwiseTrainer
from slipstream.trainers.pairwise_config import PairwiseConfig


@dataclass
class NashMDConfig(PairwiseConfig):
    """Configuration of `NashMDTrainer`; what it shares with Online DPO and XPO is in `PairwiseConfig`."""

    mixture_coef: list[float] = option(
        [0.5], "Share of the reference in the logits of the opponent; a list: one value an epoch."
    )
    loss_type: str = option("sigmoid", "Accepted for compatibility: Nash-MD has one loss.")

    def _check_values(self) -> None:
        super()._check_values()
        self.mixture_coef = schedule.checked("mixture_coef", self.mixture_coef, least=0, most=1)
        values = self.mixture_coef if isinstance(self.mixture_coef, list) else [self.mixture_coef]
        if self.use_transformers_continuous_batching and not self.use_vllm and any(0 < value < 1 for value in values):
            raise ValueError(
                f"mixture_coef={self.mixture_coef!r} does not go with use_transformers_continuous_batching=True, which "
                "gives no place to mix logits: switch it off, or set use_vllm=True."
            )

    @property
    def samples_from_reference(self) -> bool:
        """The opponent does, unless it is the policy itself in all epochs."""
        return schedule.highest(self.mixture_coef) > 0


class NashMDTrainer(PairwiseTrainer):
    """Nash-MD (https://arxiv.org/abs/2312.00886): the policy's completion y plays against one of an opponent, y', the
    geometric mixture of policy and reference, and learns from the probability that it wins. Where preferences have
    circles, this ends in their Nash equilibrium.

    Arguments are those of `PairwiseTrainer`. Metrics of rewards and lengths are those of y.

    In the log, `logps/chosen` is y's log-probability under the policy and `logps/rejected` under the reference,
    `rewards/margins` their difference; `rewards/chosen` is the score of y, `rewards/rejected` that of y'.

    Example:
        ```python
        args = NashMDConfig("out", use_vllm=True)
        trainer = NashMDTrainer("Qwen/Qwen3-0.6B", reward_funcs=accuracy_reward, args=args, train_dataset=dataset)
        trainer.train()
        ```
    """

    config_class = NashMDConfig
    args: NashMDConfig
    own_rows = slice(None, None, 2)
    uses_probabilities = True

    @property
    def keeps_groups(self) -> bool:
        """The opponent's completion is not in the loss."""
        return False

    @property
    def mixture_coef(self) -> float:
        """Of the present epoch."""
        return schedule.present(self.args.mixture_coef, self.epoch)

    def ask_engine(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """y of the policy and y' of the mixture: no prompt has both before the end."""
        return self.ask_with_reference(requests, sampling, self.mixture_coef)

    def learns_from(self, rollouts: Sequence[Rollout]) -> Sequence[Rollout]:
        """The policy's own completions."""
        return rollouts[0::2]

    def tally_samples(self, tally: Tally, scores_R: Tensor | None, ended_R: Tensor, counts_R: Tensor) -> None:
        """Scores of both sides."""
        counts_P = counts_R[0::2]
        tally.mean("val/model_contain_eos_token", ended_R[0::2], counts_P)
        tally.mean("val/ref_contain_eos_token", ended_R[1::2], counts_P)
        if scores_R is not None:
            tally.mean("rewards/chosen", scores_R[0::2], counts_P)
            tally.mean("rewards/rejected", scores_R[1::2], counts_P)

    def objective(self, output: PolicyOutput, batch: MicroBatch, tally: Tally) -> Tensor:  # type: ignore[override]
        """The mean over the completions that were judged."""
        logps, ref_logps, mask, owner = output.logps_N, batch.per_token["ref_logps"], batch.mask_N, batch.rows_N
        rows, beta, probabilities_B = len(batch.rollouts), self.beta, batch.advantages_B + 0.5
        loss_B = nash_md_loss(logps, ref_logps, probabilities_B, mask, owner, beta)
        counts_B = (row_sum(mask, owner, rows) > 0).to(mask.dtype)
        logps_B, ref_logps_B = row_sum(logps * mask, owner, rows), row_sum(ref_logps * mask, owner, rows)
        # The parts themselves have gradients that mean something, but no values: these are what they stand for.
        tally.mean("loss/kl", logps_B - ref_logps_B, counts_B)
        tally.mean("loss/score", (probabilities_B - 0.5) * logps_B, counts_B)
        tally.mean("objective/entropy", -logps_B, counts_B)
        tally.mean("objective/kl", logps_B - ref_logps_B, counts_B)
        tally.mean("logps/chosen", logps_B, counts_B)
        tally.mean("logps/rejected", ref_logps_B, counts_B)
        tally.mean("rewards/probabilities", probabilities_B, counts_B)
        tally.mean("rewards/margins", logps_B - ref_logps_B, counts_B)
        tally.mean("rewards/accuracies", logps_B > ref_logps_B, counts_B)
        for name, value in (("beta", beta), ("mixture_coef", self.mixture_coef)):
            tally.mean(name, torch.full((), value, device=loss_B.device))
        return step_mean(loss_B, counts_B, batch.totals.kept_rows, batch.totals.ranks)
