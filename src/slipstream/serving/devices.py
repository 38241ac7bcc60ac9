"""Names of accelerators, by which trainer and server find out that they are on the same one. No torch until it asks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def check_devices_apart(trainer: Iterable[str], server: Iterable[str]) -> None:
    """Raise ValueError if trainer and server share an accelerator, which NCCL cannot connect with itself.

    Args:
        trainer, server: UUIDs, with or without the driver's "GPU-" before them.
    """
    ours, theirs = ({uuid.lower().removeprefix("gpu-") for uuid in side} for side in (trainer, server))
    if ours & theirs:
        raise ValueError(
            f"trainer and server are on the same accelerator: {', '.join(sorted(ours & theirs))} (the trainer has "
            f"{', '.join(sorted(ours))}; the server has {', '.join(sorted(theirs))}). Give each its own, for example "
            "CUDA_VISIBLE_DEVICES=1 slipstream vllm-serve ... and CUDA_VISIBLE_DEVICES=0 accelerate launch ..."
        )


def uuid_of(device: torch.device) -> str:
    """Name of an accelerator that no other has."""
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)
