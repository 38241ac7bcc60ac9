"""Online DPO (https://arxiv.org/abs/2402.04792)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.checks import one_of
from slipstream.config import option
from slipstream.modeling.logprobs import PolicyOutput
from slipstream.modeling.sending import sent
from slipstream.objectives.pairwise import LOSS_TYPES, step_mean
from slipstream.records import MicroBatch
from slipstream.trainers.metrics import Tally
from slipstream.trainers.pairwise import PairwiseTrainer
from slipstream.trainers.pairwise_config import PairwiseConfig


@dataclass
class OnlineDPOConfig(PairwiseConfig):
    """Configuration of `OnlineDPOTrainer`; what it shares with Nash-MD and XPO is in `PairwiseConfig`."""

    loss_type: str = option("sigmoid", "`sigmoid` (DPO), or `ipo`.")

    def _check_values(self) -> None:
        super()._check_values()
        one_of("loss_type", self.loss_type, LOSS_TYPES)


class OnlineDPOTrainer(PairwiseTrainer):
    """Online DPO (https://arxiv.org/abs/2402.04792): the policy writes two completions of each prompt, the better one
    is judged on the spot, and DPO's loss prefers it.

    Arguments are those of `PairwiseTrainer`.

    Example:
        ```python
        args = OnlineDPOConfig("out", use_vllm=True)
        trainer = OnlineDPOTrainer("Qwen/Qwen3-0.6B", reward_funcs=accuracy_reward, args=args, train_dataset=dataset)
        trainer.train()
        ```
    """

    config_class = OnlineDPOConfig
    args: OnlineDPOConfig

    def tally_samples(self, tally: Tally, scores_R: Tensor | None, ended_R: Tensor, counts_R: Tensor) -> None:
        """Scores of both completions, and how far they are apart."""
        tally.mean("val/contain_eos_token", ended_R, counts_R)
        if scores_R is not None:
            tally.mean("objective/scores", scores_R, counts_R)
            tally.mean("objective/scores_margin", (scores_R[0::2] - scores_R[1::2]).abs(), counts_R[0::2])

    def objective(self, output: PolicyOutput, batch: MicroBatch, tally: Tally) -> Tensor:  # type: ignore[override]
        """DPO's loss, a mean over the pairs that were judged."""
        pairs, beta = self.pairs(output, batch), self.beta
        loss_P = self.preference_loss(pairs, beta, tally)
        counts_B = pairs.counts_P.repeat_interleave(2)
        non_score_B = -beta * (pairs.logps_B - pairs.ref_logps_B)
        tally.mean("objective/non_score_reward", non_score_B, counts_B)
        if self.judge is None:
            scores_B = sent(torch.tensor([r.extra["score"] for r in batch.rollouts]), non_score_B.device).nan_to_num()
            tally.mean("objective/rlhf_reward", scores_B + non_score_B, counts_B)
        return step_mean(loss_P, pairs.counts_P, batch.totals.kept_rows / 2, batch.totals.ranks)
