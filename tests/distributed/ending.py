"""How a rank of a test ends."""

from __future__ import annotations

import torch.distributed as dist


def leave() -> None:
    """End the process group: else gloo's threads are connected when the interpreter ends, and at times abort it."""
    if dist.is_initialized():
        dist.destroy_process_group()
