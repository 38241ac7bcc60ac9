"""Copies to the device that do not wait for what runs there."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(made: Tensor, device: torch.device) -> Tensor:
    """`made` on `device`. (Out of pageable memory, a copy to a GPU waits until everything before it is done.)"""
    if device.type != "cuda" or made.is_cuda:
        return made.to(device)
    return made.pin_memory().to(device, non_blocking=True)
