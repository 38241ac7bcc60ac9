"""Attention that reads what sequences share once, by Triton's interpreter, against plain attention in float64."""

from __future__ import annotations

import pytest
from interpreted import check, needs_triton

KERNEL = """
import torch
from slipstream.vllm_compat import prefix_kernel

prefix_kernel._TOKENS = 16
heads, of, width, size, chunk, places, programs, apart = {shape}
generator = torch.Generator().manual_seed(0)
# Sequences as (tokens, sequences read for together from here on, tokens in common); two rows of padding at the end.
sequences = [(90, 3, 64), (70, 0, 64), (81, 0, 64), (5, 1, 0), (100, 2, 96), (97, 0, 96), (33, 1, 32), (16, 1, 0)]
count, room = len(sequences), len(sequences) + 2
cache = torch.randn(80, size, of, 2 * width, generator=generator).transpose(1, 2)
free = iter((torch.randperm(79, generator=generator) + 1).tolist())
blocks = torch.full((room, 9), 7777777, dtype=torch.int32)
lengths, groups = torch.zeros(room, dtype=torch.int32), torch.full((2, room), 50, dtype=torch.int32)
first = 0
for place, (length, together, common) in enumerate(sequences):
    first = place if together else first
    shared = common // size
    if place != first:
        blocks[place, :shared] = blocks[first, :shared]
    else:
        shared = 0
    need = -(-length // size)
    blocks[place, shared:need] = torch.tensor([next(free) for _ in range(need - shared)])
    lengths[place], groups[0, place], groups[1, place] = length, together, common
queries = torch.randn(room, heads + 2, 2 * width, generator=generator)[..., :width]
queries = (queries if apart else queries.contiguous())[:, :heads]
out = torch.full((room, heads, width), 9.0)
parts, sums = torch.full((room, heads, places, width), 5.0), torch.full((room, heads, places, 2), 5.0)
units = torch.full((4, prefix_kernel.HEADER + room * places), 777777, dtype=torch.int32)


def attend(taken):
    prefix_kernel.plan(lengths, groups, taken, chunk, units, programs, of)
    prefix_kernel.attend(
        queries[:taken], cache, blocks, lengths, groups, units, out[:taken],
        scale=0.3, partial=parts, sums=sums, programs=programs,
    )
    for place, (length, _, _) in enumerate(sequences[:taken]):
        rows = cache[blocks[place, : -(-length // size)].long()].double()  # blocks, of, size, 2 width
        rows = rows.transpose(1, 2).reshape(-1, of, 2 * width)[:length]
        for head in range(heads):
            keys, values = rows[:, head * of // heads].split(width, -1)
            expected = (keys @ queries[place, head].double() * 0.3).softmax(0) @ values
            torch.testing.assert_close(out[place, head].double(), expected, rtol=1e-4, atol=1e-5)


# As while a graph for fewer sequences is recorded: the group of three goes on where this one ends.
attend(2)
assert (parts[2:] == 5).all() and (sums[2:] == 5).all() and (out[2:] == 9).all()
units.fill_(777777)
attend(room)
listed = int(units[0, 0])
assert units[0, 1] >= chunk and listed * of <= max(3 * programs, 4 * room)
assert (units[:, prefix_kernel.HEADER + listed :] == 777777).all()
assert not out[count:].any()
print("all equal")
"""


@needs_triton
@pytest.mark.parametrize(
    "shape",
    [
        (4, 2, 16, 16, 32, 5, 40, False),
        (12, 2, 32, 16, 16, 8, 7, False),
        (3, 3, 16, 16, 128, 2, 1, False),
        (4, 1, 16, 16, 16, 8, 1000, False),
        (4, 2, 16, 16, 32, 5, 40, True),
    ],
    ids=["grouped", "six", "single", "many programs", "heads apart"],
)
def test_shared_tokens_count_as_each_sequences_own(shape):
    check(KERNEL.replace("{shape}", repr(shape)))
