"""Colocated engines of several processes that hold one copy of the weights together (tensor parallelism)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from slipstream.generation.engine import Request, Sampling
from slipstream.records import Images


@dataclass(frozen=True, slots=True)
class Share:
    """The requests of a whole team, in the order of its ranks.

    Attributes:
        requests: All of them.
        begin: Index of this rank's first.
        end: One behind its last.
    """

    requests: Sequence[Request]
    begin: int
    end: int


def ranks() -> int:
    """Number of this run's processes."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_team(size: int, world: int | None = None) -> None:
    """Raise ValueError unless this run's processes (`world` of them, if given) can be split into teams of `size`."""
    if world is None:
        world = ranks()
    if world % size:
        raise ValueError(
            f"vllm_tensor_parallel_size={size}: a colocated engine is spread over the devices of that many processes, "
            f"so their number must be a multiple of it, and there {'is 1' if world == 1 else f'are {world}'}. Start "
            f"`accelerate launch --num_processes {size * max(1, world // size)}`, or set vllm_tensor_parallel_size "
            "to a divisor of the number of processes."
        )


def share_requests(requests: Sequence[Request], sampling: Sampling, group: Any) -> Share:
    """Everyone's requests. Every rank of `group` must call this, one that has none of its own as well.

    Each engine plans its steps for itself while they exchange activations within a step: they must be given the same
    requests in the same order.

    Args:
        requests: This rank's.
        sampling: The same on all ranks.
        group: Process group (CPU) of the engines that hold one copy of the weights.

    Raises:
        ValueError: `sampling` differs between the ranks.
    """
    import torch.distributed as dist

    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, ([_without_features(r) for r in requests], sampling), group=group)
    for rank, (_, theirs) in enumerate(gathered):
        if theirs != gathered[0][1]:
            raise ValueError(
                f"generate: ranks 0 and {rank} of a team with tensor parallelism want different sampling in one call: "
                f"{gathered[0][1]} and {theirs}"
            )
    begin = sum(len(theirs) for theirs, _ in gathered[: dist.get_rank(group)])
    return Share([request for theirs, _ in gathered for request in theirs], begin, begin + len(requests))


def _without_features(request: Request) -> Request:
    """vLLM makes its own of the pictures."""
    if request.images is None:
        return request
    return replace(request, images=Images(request.images.pictures, request.images.engine_ids))
