"""A reference model that follows the policy."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback


class ReferenceSync(TrainerCallback):
    """Moves the reference towards the policy, reference = (1 - alpha) reference + alpha policy, every so many steps
    (TR-DPO, https://arxiv.org/abs/2404.09656).

    Raises:
        ValueError: the policy is an adapter, whose reference is the base model itself.
    """

    def __init__(self, trainer: Any) -> None:
        if hasattr(trainer.model, "disable_adapter") and not hasattr(trainer.reference, "disable_adapter"):
            raise ValueError(
                "sync_ref_model=True does not go with an adapter: its reference is the frozen base model, which cannot "
                "move. Set sync_ref_model=False."
            )
        self.trainer = trainer

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move it when it is time."""
        if state.global_step % args.ref_model_sync_steps:
            return
        unwrap = self.trainer.accelerator.unwrap_model
        policy, reference = unwrap(self.trainer.model_wrapped), unwrap(self.trainer.reference)
        for theirs, ours in zip(reference.parameters(), policy.parameters(), strict=True):
            theirs.lerp_(ours.to(theirs.dtype), args.ref_model_mixup_alpha)
