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
        """The groups of neighbours by which the fewest tokens are read.

        Many prompts may begin alike: that is weighed against the longer beginnings of each one's completions.

        Args:
            blocks: Of each sequence, those that hold its prompt alone. What two share is in the same places.
            size: Tokens of a block.
        """
        # Those with the same blocks stay together in any case: what is looked at are runs of them, which are few.
        begins, lengths, alike = [], [], []
        for row, own in enumerate(blocks):
            same = _common(blocks[row - 1], own) if row else 0
            if same * size < LEAST:
                same = 0
            if not same or not same == len(own) == len(blocks[row - 1]):
                begins.append(row)
                lengths.append(len(own))
                alike.append(same)
        begin, common = np.array([*begins, len(blocks)]), np.array(lengths, np.int64)
        # Of all up to a run: the blocks that are saved at most, and the last group's first run and common blocks.
        saved, last, chain = np.zeros(len(begin), np.int64), [], 0
        for run, same in enumerate(alike):
            if same:
                common[chain:run] = np.minimum(common[chain:run], same)
            else:
                chain = run
            first = slice(chain, run + 1)
            if_so = saved[first] + common[first] * (begin[run + 1] - begin[first] - 1)
            best = chain + int(if_so.argmax())
            saved[run + 1] = if_so[best - chain]
            last.append((best, int(common[best])))
        group, tokens, end = np.arange(len(blocks)), np.zeros(len(blocks), np.int64), len(last)
        while end:
            first_run, shared = last[end - 1]
            rows = slice(int(begin[first_run]), int(begin[end]))
            group[rows] = rows.start
            tokens[rows] = shared * size if rows.stop - rows.start > 1 else 0
            end = first_run
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
