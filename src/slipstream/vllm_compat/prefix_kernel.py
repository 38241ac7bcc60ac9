"""Attention of one new token a sequence, that reads what sequences share once for all of them. See `steady_prefixes`.

Of 8 completions of a 1000-token prompt, a decode step otherwise reads the prompt's keys and values 8 times, and most of
such a step is reading. Here a sequence's tokens are attended to in chunks: those of a shared prefix at once for all
sequences of the group, the others for each sequence. `plan` lists a step's chunks, as many programs as the GPU has room
for go through the list in every layer, and each sequence's chunks are put together.

Imports Triton: import it where one is there.

Legend: P sequences, H query heads, K heads of keys and values, D the width of a head, C chunks of a sequence at most.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 64
"""Queries, of all heads that share a head of keys, that a program has for a shared chunk."""

PROGRAMS = 3
"""Programs for each of the GPU's multiprocessors."""

HEADER = 2
"""Integers of a plan before its chunks: how many there are, and how many tokens one has."""

_TOKENS, _WARPS, _STAGES, _REGISTERS = 32, 4, 3, 168


def plan(lengths: Tensor, groups: Tensor, count: int, chunk: int, units: Tensor, programs: int, of: int) -> None:
    """List the chunks of a step's first `count` sequences in `units`.

    Their size is such that there is about one for each program, but at least `chunk` tokens. `of` is K, and the others
    are `attend`'s, of which `groups` has the same size whatever `count` is: one kernel is compiled for all.
    """
    _plan[(1,)](
        lengths, groups, count, groups.stride(0), units, units.stride(0), chunk, programs, of,
        PADDED=triton.next_power_of_2(groups.shape[1]), num_warps=4,
    )  # fmt: skip


def attend(
    queries: Tensor, cache: Tensor, blocks: Tensor, lengths: Tensor, groups: Tensor, units: Tensor, out: Tensor,
    *, scale: float, partial: Tensor, sums: Tensor, programs: int,
) -> None:  # fmt: skip
    """Write the attention of P new tokens to `out`, (P, H, D).

    Args:
        queries: (P, H, D), of any strides.
        cache: (blocks, K, tokens of a block, 2 D): keys, then values, as vLLM 0.26 keeps them; any strides but the
            last's.
        blocks: int32 (P or more, B): each sequence's blocks of the cache.
        lengths: int32 (P or more,): tokens that a sequence attends to, its new one among them; 0 for padding.
        groups: int32 (2, S), S >= P: how many sequences, from this one on, are read for together (0 where the
            sequence is not its group's first), at most ROWS * K / H; and how many tokens these have in common.
        units: int32 (4, HEADER + P * C or more): by `plan`.
        scale: Of the scores.
        partial, sums: float32 (P, H, C, D) and (P, H, C, 2): room for chunks' results; C is at least
            ceil(length / chunk) + 1 with the `chunk` that `plan` was given.
        programs: That go through the list.
    """
    count, heads, width = out.shape
    of, size, chunks = cache.shape[1], cache.shape[2], partial.shape[2]
    if queries.stride()[1:] != (width, 1):  # a part of each head's projection, say
        queries = queries.contiguous()
    _chunks[(programs,)](
        queries, cache, blocks, units, partial, sums, scale * 1.4426950408889634,
        queries.stride(0), cache.stride(0), cache.stride(1), cache.stride(2), blocks.stride(0), units.stride(0),
        HEADS=heads, PER=heads // of, WIDTH=width, SIZE=size, CHUNKS=chunks,
        ROWS=ROWS, FEW=max(16, triton.next_power_of_2(heads // of)), TOKENS=_TOKENS, HEADER=HEADER,
        num_warps=_WARPS, num_stages=_STAGES, maxnreg=_REGISTERS,
    )  # fmt: skip
    _join[(count, heads)](
        partial, sums, lengths, groups, units, out, out.stride(0), groups.stride(0),
        HEADS=heads, WIDTH=width, CHUNKS=chunks, PADDED=triton.next_power_of_2(chunks), num_warps=1,
    )  # fmt: skip


@triton.jit
def _plan(lengths, groups, count, group_stride, units, stride, least, programs, of, PADDED: tl.constexpr):
    place = tl.arange(0, PADDED)
    there = place < count
    length = tl.load(lengths + place, there, other=0)
    common = tl.minimum(tl.load(groups + group_stride + place, there, other=0), length)
    # A graph that is recorded for fewer sequences than the step has is not to reach beyond its own.
    together = tl.minimum(tl.load(groups + place, there, other=0), count - place)
    # About what a program has to read, and rather less: measured on an H200.
    read = tl.sum(length - common + tl.where(together > 0, common, 0), 0) * of
    chunk = least
    while read * 4 > chunk * 7 * programs:
        chunk *= 2
    shared = tl.cdiv(common, chunk)
    all_of_it = shared + tl.cdiv(length - common, chunk)
    listed = 0
    # Chunks of the same number side by side: the shared ones, which take longest, come first.
    for number in range(tl.max(all_of_it, 0)):
        own = number >= shared
        wanted = (number < all_of_it) & ((together > 0) | own)
        begin = tl.where(own, common + (number - shared) * chunk, number * chunk)
        one = wanted.to(tl.int32)
        to = units + 1 + listed + tl.cumsum(one, 0)
        tl.store(to, number * 65536 + place, wanted)
        tl.store(to + stride, begin, wanted)
        tl.store(to + 2 * stride, tl.minimum(begin + chunk, tl.where(own, length, common)), wanted)
        tl.store(to + 3 * stride, tl.where(own, 0, together), wanted)
        listed += tl.sum(one, 0)
    tl.store(units, listed)
    tl.store(units + 1, chunk)


@triton.jit
def _chunks(
    queries, cache, blocks, units, partial, sums, scale,
    query_stride, block_stride, head_stride, token_stride, table_stride, stride,
    HEADS: tl.constexpr, PER: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, FEW: tl.constexpr, TOKENS: tl.constexpr, HEADER: tl.constexpr,
):  # fmt: skip
    OF: tl.constexpr = HEADS // PER
    for job in range(tl.program_id(0), tl.load(units) * OF, tl.num_programs(0)):
        unit = units + HEADER + job // OF
        head, what, begin, end = job % OF, tl.load(unit), tl.load(unit + stride), tl.load(unit + 2 * stride)
        together, place, number = tl.load(unit + 3 * stride), what % 65536, what // 65536
        table, keys = blocks + place.to(tl.int64) * table_stride, cache + head * head_stride
        if together > 0:
            _chunk(
                queries, keys, table, partial, sums, scale, query_stride, block_stride, token_stride,
                place, head, number, together, begin, end, HEADS, PER, WIDTH, SIZE, CHUNKS, ROWS, TOKENS,
            )  # fmt: skip
        else:
            _chunk(
                queries, keys, table, partial, sums, scale, query_stride, block_stride, token_stride,
                place, head, number, 1, begin, end, HEADS, PER, WIDTH, SIZE, CHUNKS, FEW, TOKENS,
            )  # fmt: skip


@triton.jit
def _chunk(
    queries, keys, table, partial, sums, scale, query_stride, block_stride, token_stride,
    place, head, number, count, begin, end,
    HEADS: tl.constexpr, PER: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Attention of `count` sequences, from `place` on, to the tokens from `begin` to `end` of the first one's."""
    row, lane, at = tl.arange(0, ROWS), tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    there = row // PER < count
    sequence, query_head = (place + row // PER).to(tl.int64), head * PER + row % PER
    to = queries + sequence * query_stride + query_head * WIDTH
    query = tl.load(to[:, None] + at[None, :], there[:, None], other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    # Where the next tokens lie is read ahead: keys whose address is still on its way are not.
    block = tl.load(table + (begin + lane) // SIZE, begin + lane < end, other=0)
    for start in range(begin, end, TOKENS):
        token = start + lane
        known = token < end
        where = keys + block.to(tl.int64) * block_stride + (token % SIZE) * token_stride
        block = tl.load(table + (token + TOKENS) // SIZE, token + TOKENS < end, other=0)
        key = tl.load(where[None, :] + at[:, None], known[None, :], other=0.0)
        value = tl.load(where[:, None] + (WIDTH + at)[None, :], known[:, None], other=0.0)
        score = tl.where(known[None, :], tl.dot(query, key) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        shrunk, weight = tl.exp2(top - higher), tl.exp2(score - higher[:, None])
        total = total * shrunk + tl.sum(weight, 1)
        result = tl.dot(weight.to(value.dtype), value, result * shrunk[:, None])
        top = higher
    left = (sequence * HEADS + query_head) * CHUNKS + number
    tl.store(sums + left * 2, top, there)
    tl.store(sums + left * 2 + 1, total, there)
    tl.store(partial + left[:, None] * WIDTH + at[None, :], result, there[:, None])


@triton.jit
def _join(
    partial, sums, lengths, groups, units, out, out_stride, group_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    place, head = tl.program_id(0), tl.program_id(1)
    length, chunk = tl.load(lengths + place), tl.load(units + 1)
    common = tl.minimum(tl.load(groups + group_stride + place), length)
    used = tl.cdiv(common, chunk) + tl.cdiv(length - common, chunk)
    number, at = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    there = number < used
    left = (place.to(tl.int64) * HEADS + head) * CHUNKS + number
    top = tl.load(sums + left * 2, there, other=float("-inf"))
    # Padding has no tokens, and whatever it gets is finite.
    weight = tl.where(there, tl.exp2(top - tl.max(top, 0)), 0.0)
    total = tl.sum(weight * tl.load(sums + left * 2 + 1, there, other=0.0), 0)
    part = tl.load(partial + left[:, None] * WIDTH + at[None, :], there[:, None], other=0.0)
    result = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    to = out + place.to(tl.int64) * out_stride + head * WIDTH + at
    tl.store(to, result.to(out.dtype.element_ty))
