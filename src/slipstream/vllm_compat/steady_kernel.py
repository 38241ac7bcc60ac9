"""The inputs of a step that only decodes, made on the GPU in one launch. See `steady_runner`.

Imports Triton: import it where one is there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PAD_SLOT = -1  # vLLM's: the token's keys and values go nowhere
_WIDTH = 256


def inputs(
    rows: Tensor, computed: Tensor, last: Tensor, table: Tensor, block_size: int, padded: int,
    *, ids: Tensor, positions: Tensor, seq_lens: Tensor, slots: Tensor, starts: Tensor, blocks: Tensor,
    sampled: Tensor, updated: Tensor,
) -> None:  # fmt: skip
    """Write what vLLM's decode graph for `padded` sequences reads, the batch's sequences first, then padding.

    S is the number of sequences that vLLM has room for, B that of a sequence's blocks. Of the outputs the first
    `padded` rows are written, of `starts` one more.

    Args:
        rows: int32 (1 + S,): how many sequences there are, and which rows of vLLM's states they have.
        computed: int32 (S,): tokens whose keys and values are in the cache.
        last: int64 (S, 1): the last sampled token, which is the step's input.
        table: int32 (S, B): blocks of the cache.
        block_size: Tokens of a block.
        padded: Sequences of the graph, at least as many as there are.
        ids: int32: input tokens.
        positions: int64: their positions.
        seq_lens: int32: tokens that they attend to; 0 for padding.
        slots: int64: where in the cache their keys and values go.
        starts: int32: where each sequence's tokens begin.
        blocks: int32 (S, B): rows of `table`, in the batch's order.
        sampled: int32: rows of vLLM's states to sample for: the first sequence's for padding.
        updated: int32: rows of vLLM's states to update: -1 for padding.
    """
    _inputs[(padded,)](
        rows, computed, last, table, table.stride(0),
        ids, positions, seq_lens, slots, starts, blocks, sampled, updated,
        BLOCK_SIZE=block_size, PAD=PAD_SLOT, WIDTH=_WIDTH, num_warps=1,
    )  # fmt: skip


@triton.jit
def _inputs(
    rows, computed, last, table, stride,
    ids, positions, seq_lens, slots, starts, blocks, sampled, updated,
    BLOCK_SIZE: tl.constexpr, PAD: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    count = tl.load(rows)
    lane = tl.arange(0, WIDTH)
    to = blocks + place.to(tl.int64) * stride
    if place == 0:
        tl.store(starts, 0)
    tl.store(starts + place + 1, tl.minimum(place + 1, count))
    if place < count:
        row = tl.load(rows + 1 + place)
        done = tl.load(computed + row)
        of = table + row.to(tl.int64) * stride
        tl.store(ids + place, tl.load(last + row).to(tl.int32))
        tl.store(positions + place, done.to(tl.int64))
        tl.store(seq_lens + place, done + 1)
        block = tl.load(of + done // BLOCK_SIZE).to(tl.int64)
        tl.store(slots + place, block * BLOCK_SIZE + done % BLOCK_SIZE)
        have = done // BLOCK_SIZE + 1
        for begin in range(0, have, WIDTH):
            there = begin + lane < have
            tl.store(to + begin + lane, tl.load(of + begin + lane, there, other=0), there)
        tl.store(sampled + place, row)
        tl.store(updated + place, row)
    else:
        tl.store(ids + place, 0)
        tl.store(positions + place, tl.zeros([], tl.int64))
        tl.store(seq_lens + place, 0)
        tl.store(slots + place, tl.full([], PAD, tl.int64))
        for begin in range(0, stride, WIDTH):
            tl.store(to + begin + lane, tl.zeros([WIDTH], tl.int32), begin + lane < stride)
        tl.store(sampled + place, tl.load(rows + 1))
        tl.store(updated + place, tl.full([], -1, tl.int32))
