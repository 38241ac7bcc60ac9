"""Which sequences of a batch begin with the same blocks of the cache, and are worth reading for together.

vLLM's prefix cache keeps a prompt once for all of its completions; its attention still reads it once for each of them.
Of a batch that only decodes, groups are found when it comes together (`Prefixes.of`), stay when sequences leave, and
are what `prefix_kernel` attends by. Only numpy here: the batch is the scheduler's.

Legend: R sequences, in the batch's order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

LEAST = 128
"""Tokens that sequences must have in common."""

SAVED = 0.2
"""Share of a step's keys and values that need not be read again, from which reading them once is quicker."""


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """Groups of sequences, each next to the others of its group.

    Attributes:
        group: (R,) number of a sequence's group, ascending.
        tokens: (R,) tokens that all sequences of the group begin with, 0 for one that stands alone.
    """

    group: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, blocks: Sequence[Sequence[int]], size: int) -> Prefixes:
        """Groups of neighbours that have blocks in common.

        Args:
            blocks: Of each sequence, those that hold its prompt alone. What two share is in the same places.
            size: Tokens of a block.
        """
        group, tokens = np.zeros(len(blocks), np.int64), np.zeros(len(blocks), np.int64)
        first = common = 0
        for row in range(1, len(blocks)):
            same = _common(blocks[row - 1], blocks[row])
            longest = min(common, same) if row - first > 1 else same
            # One more with a shorter beginning shortens it for all: not where more is read that way.
            if longest * size < LEAST or longest * (row - first) < common * (row - first - 1):
                first, common = row, 0
            else:
                common = longest
            group[row] = first
            tokens[first : row + 1] = common * size
        return cls(group, tokens)

    def part(self, rows: np.ndarray) -> Prefixes:
        """That of some of the sequences, in the same order."""
        return Prefixes(self.group[rows], self.tokens[rows])

    def read(self, most: int) -> tuple[np.ndarray, int]:
        """Who is read for together, at most `most` sequences.

        Returns:
            int32 (2, R): how many sequences are read for, from this one on (0: one before it stands for this one, too),
            and how many tokens they have in common; and how many tokens less are read in every step.
        """
        count = len(self.group)
        begins = np.ones(count, bool)
        begins[1:] = self.group[1:] != self.group[:-1]
        since = np.arange(count) - np.maximum.accumulate(np.where(begins, np.arange(count), 0))
        (leaders,) = np.nonzero(since % most == 0)
        members = np.diff(leaders, append=count)
        together, tokens = np.zeros(count, np.int32), np.repeat(np.where(members > 1, self.tokens[leaders], 0), members)
        together[leaders] = members
        return np.stack([together, tokens.astype(np.int32)]), int(((members - 1) * tokens[leaders]).sum())


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many blocks two sequences begin with alike."""
    if not one or not other or one[0] != other[0]:
        return 0
    count = min(len(one), len(other))
    if one[:count] == other[:count]:
        return count
    return next(place for place in range(count) if one[place] != other[place])
