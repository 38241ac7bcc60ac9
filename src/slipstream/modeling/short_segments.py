"""Short segments of a row side by side: one call of attention for many of them.

A call for each segment costs more than its attention when segments have tens of tokens. Segments of similar lengths
are put into a batch and padded; a mask hides the padding.

Legend: T tokens of the row, S segments of a batch, Q and K their padded queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.modeling.sending import sent
from slipstream.records import Segment

# Beyond, a call has enough to do, and a mask of all pairs would be large.
SHORT = 256


@dataclass(frozen=True)
class Batch:
    """Segments that attend together. Indices are tokens of the row; padding repeats its first token."""

    queries_SQ: Tensor
    keys_SK: Tensor
    seen_SQK: Tensor  # bool


@dataclass(frozen=True)
class Batches:
    """How a row is attended to: each of `batches` in one call, then each segment of `alone`.

    `order_T` says where each token's result stands when the results of all calls are put one after the other.
    """

    batches: tuple[Batch, ...]
    alone: tuple[int, ...]
    order_T: Tensor


def batches_of(segments: Sequence[Segment], window: int | None, device: torch.device) -> Batches:
    """Put segments of similar lengths together; `window` is how many tokens back each token looks (None: all)."""
    lengths = torch.tensor([s.length for s in segments])
    before = torch.tensor([0 if s.parent is None else segments[s.parent].length for s in segments])
    starts = lengths.cumsum(0) - lengths
    parents = torch.tensor([0 if s.parent is None else int(starts[s.parent]) for s in segments])
    alike: dict[tuple[int, int], list[int]] = {}
    for i, (own, keys) in enumerate(zip(lengths.tolist(), (lengths + before).tolist(), strict=True)):
        # Lengths up to the same power of two: the padding is less than half of each side.
        size = (own.bit_length(), keys.bit_length()) if keys <= SHORT else (-1, i)
        alike.setdefault(size, []).append(i)
    together = [torch.tensor(members) for members in alike.values() if len(members) > 1]
    alone = tuple(members[0] for members in alike.values() if len(members) == 1)
    made = []
    order_T = torch.empty(int(lengths.sum()), dtype=torch.long)
    done = 0
    for members in together:
        batch, tokens, rows = _batch(starts[members], lengths[members], parents[members], before[members], window)
        order_T[tokens] = rows + done
        done += batch.queries_SQ.numel()
        made.append(Batch(*(sent(x, device) for x in (batch.queries_SQ, batch.keys_SK, batch.seen_SQK))))
    for i in alone:
        places = torch.arange(int(lengths[i]))
        order_T[places + starts[i]] = places + done
        done += len(places)
    return Batches(tuple(made), alone, sent(order_T, device))


def _batch(
    starts_S: Tensor, lengths_S: Tensor, parents_S: Tensor, before_S: Tensor, window: int | None
) -> tuple[Batch, Tensor, Tensor]:
    """A batch, the tokens of the row that are its queries, and where these stand among its S * Q rows."""
    starts, lengths, parents, before = (x.unsqueeze(1) for x in (starts_S, lengths_S, parents_S, before_S))
    query = torch.arange(int(lengths.max())).unsqueeze(0)
    key = torch.arange(int((lengths + before).max())).unsqueeze(0)
    real_SQ = query < lengths
    queries_SQ = torch.where(real_SQ, starts + query, 0)
    keys_SK = torch.where(key < before, parents + key, starts + key - before)
    keys_SK = torch.where(key < lengths + before, keys_SK, 0)
    # Queries are the last of their keys.
    back = (query + before).unsqueeze(2) - key.unsqueeze(1)
    seen_SQK = back >= 0 if window is None else (back >= 0) & (back < window)
    # What a padded query sees is not used, but it has to see something: nothing at all would give NaN.
    seen_SQK |= ~real_SQ.unsqueeze(2)
    return Batch(queries_SQ, keys_SK, seen_SQK), queries_SQ[real_SQ], real_SQ.flatten().nonzero().squeeze(1)
