"""What Online DPO, Nash-MD and XPO share: two completions of each prompt, and which of them is better."""

from __future__ import annotations

import os
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slipstream.config import OnlineConfig
from slipstream.generation.engine import Request, Sampling
from slipstream.judges import BasePairwiseJudge
from slipstream.modeling.logprobs import PolicyOutput
from slipstream.objectives import pairwise
from slipstream.objectives.advantages import combine_rewards
from slipstream.objectives.segments import row_sum
from slipstream.records import Completion, MicroBatch, Rollout
from slipstream.trainers import inputs, judging, schedule
from slipstream.trainers.base import OnlineTrainer
from slipstream.trainers.metrics import Tally, reward_metrics
from slipstream.trainers.pairwise_config import PairwiseConfig


@dataclass(frozen=True, slots=True)
class Pairs:
    """The rows of a micro-batch, two by two. (B,) a value a row, (P,) a value a pair.

    Attributes:
        logps_B, ref_logps_B: Log-probability of each completion under the policy (differentiable) and the reference.
        first_P: True where the first completion is chosen.
        counts_P: 1 for pairs that were judged.
    """

    logps_B: Tensor
    ref_logps_B: Tensor
    first_P: Tensor
    counts_P: Tensor

    def chosen(self, values_B: Tensor) -> Tensor:
        """The better one's value of each pair."""
        return torch.where(self.first_P, values_B[0::2], values_B[1::2])

    def rejected(self, values_B: Tensor) -> Tensor:
        """The worse one's value of each pair."""
        return torch.where(self.first_P, values_B[1::2], values_B[0::2])


class PairwiseTrainer(OnlineTrainer):
    """The base of trainers that compare two completions of each prompt.

    Args:
        model: Name or folder of a causal language model, or the model.
        ref_model: The reference; None: the model as it is at first.
        reward_funcs: As in `OnlineTrainer`: functions, reward models or their names. The higher sum is better.
        args: The configuration.
        data_collator: Accepted for compatibility: leave it None.
        train_dataset, eval_dataset, processing_class, reward_processing_classes: As in `OnlineTrainer`.
        peft_config: Train an adapter; the reference is the model without it.
        compute_metrics: Accepted for compatibility: leave it None. Reward functions can log metrics.
        callbacks, optimizers: As in transformers.Trainer.
        preprocess_logits_for_metrics: Accepted for compatibility: leave it None.
        judge: Compares completions in the place of `reward_funcs`: see `slipstream.judges`. A pair that it fails to
            judge is left out of the loss and counted in `judgements/failed`.
        reward_model, reward_processing_class: Older names of `reward_funcs` and `reward_processing_classes`.
        quantization_config: For loading the model quantized.

    Raises:
        ValueError, TypeError: an argument is missing or wrong; exactly one of `reward_funcs` and `judge` is needed.
    """

    args: PairwiseConfig
    score_temperature = 1.0
    # Whether the loss takes the probability that a completion is better, or only which one is.
    uses_probabilities = False

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        ref_model: nn.Module | None = None,
        reward_funcs: Any = None,
        args: PairwiseConfig | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        peft_config: Any = None,
        compute_metrics: None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: None = None,
        *,
        judge: BasePairwiseJudge | None = None,
        reward_model: Any = None,
        reward_processing_class: Any = None,
        quantization_config: Any = None,
    ) -> None:
        unused = {
            "data_collator": data_collator, "compute_metrics": compute_metrics,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }  # fmt: skip
        for name, value in unused.items():
            if value is not None:
                raise ValueError(f"{name}={value!r} has nothing to work on here: leave it None.")
        if ref_model is not None and ref_model is model:
            raise ValueError("ref_model is the model itself, which changes: pass a copy of it, or None.")
        if not isinstance(ref_model, nn.Module | None):
            raise TypeError(
                f"ref_model={ref_model!r} is not a model: pass one that is loaded, or None for the model as it is at "
                "first."
            )
        if reward_model is not None and reward_funcs is not None:
            raise ValueError(
                "reward_funcs and reward_model are both given, and reward_model is its older name: pass reward_funcs, "
                "a list if there are several."
            )
        if reward_model is not None or reward_processing_class is not None:
            warnings.warn(
                "reward_model and reward_processing_class are older names of reward_funcs and "
                "reward_processing_classes: use these.",
                FutureWarning,
                stacklevel=2,
            )
            reward_funcs = reward_model if reward_funcs is None else reward_funcs
            reward_processing_classes = reward_processing_classes or reward_processing_class
        model = str(model) if isinstance(model, os.PathLike) else model
        config = self._checked_args(args, model)
        if reward_funcs is None and judge is None:
            reward_funcs = config.reward_model_path
        self.judge = judging.checked_judge(judge, reward_funcs, config)
        if self.compares_equals(config):
            warnings.warn(judging.EQUALS, UserWarning, stacklevel=2)
        if config.use_vllm and config.vllm_mode == "colocate" and config.vllm_max_model_length is None:
            # No more is ever asked of it. A server's length is its own.
            config.vllm_max_model_length = (inputs.longest_sequence(model, config) or (None,))[0]
        super().__init__(
            model, reward_funcs, config, train_dataset, eval_dataset, processing_class, reward_processing_classes,
            callbacks, optimizers, quantization_config, peft_config, ref_model,
        )  # fmt: skip

    @abstractmethod
    def tally_samples(self, tally: Tally, scores_R: Tensor | None, ended_R: Tensor, counts_R: Tensor) -> None:
        """Measure what was sampled, the two completions of each prompt side by side.

        Args:
            tally: Takes the metrics.
            scores_R: Score of each completion; None where a judge compares.
            ended_R: 1 for completions that were not cut off.
            counts_R: 1 for completions that count, two by two.
        """

    @staticmethod
    def _uses_reference(args: OnlineConfig) -> bool:
        return True

    @property
    def keeps_groups(self) -> bool:
        """A pair's rows enter the loss together."""
        return True

    def compares_equals(self, args: PairwiseConfig) -> bool:
        """Whether evaluations ask the judge about a completion and itself: both are the policy's, without chance."""
        return self.judge is not None and self.own_rows == slice(None) and args.eval_temperature == 0

    @property
    def beta(self) -> float:
        """Of the present epoch."""
        return schedule.present(self.args.beta, self.epoch)

    def credit(self, rollouts: Sequence[Rollout], group_size: int, real: int) -> dict[str, float]:
        """Advantages p - 1/2, where p is the probability (or 0 or 1) that a completion is better than the other."""
        device, tally, metrics = self.accelerator.device, Tally(), {}
        truncated_R = torch.tensor([r.truncated for r in rollouts], dtype=torch.float32, device=device)
        counts_R = (torch.arange(len(rollouts), device=device) < real).float()
        scores_R = None
        if self.judge is not None:
            first_P = torch.tensor(judging.probabilities(self.judge, rollouts, real), dtype=torch.float64).to(device)
            if not self.uses_probabilities:
                # A half is no vote: a judge that is asked in both orders may contradict itself.
                first_P = first_P.where(first_P != 0.5, torch.nan).round()
        else:
            rewards_RF = self.reward_table(rollouts)
            counted_RF = self.accelerator.gather(rewards_RF)[self.accelerator.gather(counts_R) > 0]
            size = len(range(group_size)[self.own_rows])
            names, weights_F = self.rewards.names, self.reward_weights_F
            metrics = reward_metrics(counted_RF[self.own_rows], weights_F, names, size)
            scores_R = combine_rewards(rewards_RF, weights_F)
            scores_R = pairwise.penalize_missing_eos(scores_R, truncated_R, self.args.missing_eos_penalty)
            first_P = self._compared(scores_R[0::2], scores_R[1::2])
            for rollout, score in zip(rollouts, scores_R.tolist(), strict=True):
                rollout.extra["score"] = score
        tally.mean("judgements/failed", first_P.isnan(), counts_R[::2])
        judged_R = (~first_P.isnan()).repeat_interleave(2)
        self.tally_samples(
            tally, None if scores_R is None else scores_R.nan_to_num(), 1 - truncated_R, counts_R * judged_R
        )
        lead_R = torch.stack([first_P - 0.5, 0.5 - first_P], dim=1).flatten().nan_to_num()
        for rollout, lead, judged in zip(rollouts, lead_R.tolist(), judged_R.tolist(), strict=True):
            rollout.advantage = lead
            rollout.in_loss = rollout.in_loss and judged
        return metrics | tally.reduce(self.accelerator)

    def _compared(self, first_P: Tensor, second_P: Tensor) -> Tensor:
        """The probability (or 0 or 1) that the first completion is better; NaN: one of them has no score."""
        first_P, second_P = first_P.double(), second_P.double()
        if self.uses_probabilities:
            return pairwise.preference_probabilities(first_P, second_P)
        choice = pairwise.choose(first_P, second_P)
        return torch.where(choice.judged_P, choice.first_P.double(), torch.nan)

    def pairs(self, output: PolicyOutput, batch: MicroBatch) -> Pairs:
        """A micro-batch as pairs."""
        mask, owner, rows = batch.mask_N, batch.rows_N, len(batch.rollouts)
        logps_B = row_sum(output.logps_N * mask, owner, rows)
        ref_logps_B = row_sum(batch.per_token["ref_logps"] * mask, owner, rows)
        counts_P = (row_sum(mask, owner, rows)[0::2] > 0).to(mask.dtype)
        return Pairs(logps_B, ref_logps_B, batch.advantages_B[0::2] > 0, counts_P)

    def preference_loss(self, pairs: Pairs, beta: float, tally: Tally) -> Tensor:
        """The loss of each pair, by `loss_type`, and the metrics of what it is made of."""
        logps, ref = pairs.logps_B, pairs.ref_logps_B
        margins_P = pairwise.margins(pairs.chosen(logps), pairs.rejected(logps), pairs.chosen(ref), pairs.rejected(ref))
        kl_B, counts_B = logps - ref, pairs.counts_P.repeat_interleave(2)
        tally.mean("objective/kl", kl_B, counts_B)
        tally.mean("objective/entropy", -logps, counts_B)
        for name, side in (("chosen", pairs.chosen), ("rejected", pairs.rejected)):
            tally.mean(f"logps/{name}", side(logps), pairs.counts_P)
            tally.mean(f"rewards/{name}", beta * side(kl_B), pairs.counts_P)
        tally.mean("rewards/margins", beta * margins_P, pairs.counts_P)
        tally.mean("rewards/accuracies", margins_P > 0, pairs.counts_P)
        tally.mean("beta", torch.full((), beta, device=logps.device))
        return pairwise.preference_loss(margins_P, beta, self.args.loss_type)  # type: ignore[attr-defined]

    def ask_with_reference(
        self, requests: Sequence[Request], sampling: Sampling, mixture: float
    ) -> list[list[Completion]]:
        """The policy's completion of each prompt, and one of the mixture with the reference, in two calls."""
        own = [replace(request, n=1) for request in requests]
        others = [replace(r, n=1, seed=None if r.seed is None else r.seed + 1, mixture=mixture) for r in requests]
        answers = (self.engine.generate(own, sampling), self.engine.generate(others, sampling))
        return [[*first, *second] for first, second in zip(*answers, strict=True)]
