"""Cutting a line of units into micro-batches of similar cost.

A unit is what may not be cut apart: a rollout, or a group that a loss compares. Its cost in tokens depends on whether
the unit before it is in the same micro-batch: then a prompt that both have is there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Unit = TypeVar("Unit")


def pieces_within(opening: Sequence[int], following: Sequence[int], most: int) -> list[int]:
    """The fewest pieces whose cost stays within `most`; a unit that exceeds it alone is a piece of its own.

    Args:
        opening: Cost of each unit as the first of its piece.
        following: Cost of each unit behind the unit before it.
        most: The largest cost of a piece.

    Returns:
        Number of units of each piece.
    """
    sizes: list[int] = []
    cost = 0
    for first, next_ in zip(opening, following, strict=True):
        if sizes and cost + next_ <= most:
            sizes[-1] += 1
            cost += next_
        else:
            sizes.append(1)
            cost = first
    return sizes


def balanced_pieces(opening: Sequence[int], following: Sequence[int], count: int) -> list[int]:
    """Exactly `count` pieces, the most expensive of which is as cheap as it can be.

    Where units cost more as the first of a piece, it may be more expensive than that, by this difference twice at most.

    Returns:
        Number of units of each piece.

    Raises:
        ValueError: there are fewer units than pieces.
    """
    if count > len(opening):
        raise ValueError(
            f"{len(opening)} rollouts or groups cannot make {count} micro-batches: every rank needs as many as the "
            "others."
        )
    low, high = max(opening, default=0), sum(opening)
    while low < high:
        middle = (low + high) // 2
        if len(pieces_within(opening, following, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    sizes = pieces_within(opening, following, low)
    while len(sizes) < count:
        _halve_the_largest(sizes, opening, following)
    return sizes


def at_least(pieces: Sequence[list[Unit]], count: int) -> list[list[Unit]]:
    """`pieces`, the largest of which are cut in two until there are `count` of them.

    Raises:
        ValueError: there are fewer units than that.
    """
    made = list(pieces)
    while len(made) < count:
        largest = max(range(len(made)), key=lambda i: len(made[i]), default=0)
        if not made or len(made[largest]) < 2:
            raise ValueError(
                f"{len(made)} rollouts or groups cannot make {count} micro-batches: every rank needs as many as the "
                "others."
            )
        middle = len(made[largest]) // 2
        made[largest : largest + 1] = [made[largest][:middle], made[largest][middle:]]
    return made


def _halve_the_largest(sizes: list[int], opening: Sequence[int], following: Sequence[int]) -> None:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    costs = [opening[a] + sum(following[a + 1 : a + n]) for a, n in zip(starts, sizes, strict=True)]
    chosen = max((i for i, n in enumerate(sizes) if n > 1), key=lambda i: costs[i])
    start, size = starts[chosen], sizes[chosen]
    left, best = opening[start], (costs[chosen], 1)
    for cut in range(1, size):
        right = opening[start + cut] + sum(following[start + cut + 1 : start + size])
        best = min(best, (max(left, right), cut))
        left += following[start + cut]
    sizes[chosen : chosen + 1] = [best[1], size - best[1]]
