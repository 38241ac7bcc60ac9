"""Kernels that go through many pairs of tensors on a GPU in one launch: are values finite, copy, compare.

Each program works on one piece of one pair. The pieces lie in a table of addresses, so that a model of hundreds of
tensors costs one launch, and none of Python's time for each of them. Imports Triton: import it where one is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 1 << 16  # values of a program
_BLOCK = 2048  # values it reads at a time
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_BITS = {torch.float32: tl.int32, torch.bfloat16: tl.int16, torch.float16: tl.int16}
_EXPONENT = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # all ones: not finite


def table_of(pairs: Sequence[tuple[int, Tensor, Tensor]], device: torch.device) -> Tensor:
    """Rows of held address, sent address, number of values, and pair, int64 (4, pieces), on `device`.

    Args:
        pairs: Number of the pair (where its flag is), what is held, what was sent: contiguous, equally many values.
        device: Where they are.
    """
    held = torch.tensor([tensor.data_ptr() for _, tensor, _ in pairs])
    sent = torch.tensor([tensor.data_ptr() for _, _, tensor in pairs])
    sizes = torch.tensor([tensor.numel() for _, tensor, _ in pairs])
    numbers = torch.tensor([number for number, _, _ in pairs])
    pieces = (sizes + PIECE - 1) // PIECE
    pair = torch.repeat_interleave(torch.arange(len(pairs)), pieces)
    begin = (torch.arange(len(pair)) - (pieces.cumsum(0) - pieces)[pair]) * PIECE
    rows = [
        held[pair] + begin * pairs[0][1].element_size(),
        sent[pair] + begin * pairs[0][2].element_size(),
        (sizes[pair] - begin).clamp(max=PIECE),
        numbers[pair],
    ]
    return torch.stack(rows).to(device)


def mark_unlike(table: Tensor, flags: Tensor, held: torch.dtype, sent: torch.dtype, aligned: bool) -> None:
    """Set `flags[number]` to 1 for every pair of `table` whose bits differ after a cast of `sent` to `held`.

    Args:
        table: From `table_of`.
        flags: int32, on the table's device.
        held: Type of what is held: float32, bfloat16 or float16.
        sent: Type of what was sent.
        aligned: Whether every address is a multiple of 16 bytes, so that it is read 16 bytes at a time.
    """
    _launch(_unlike, table, flags, held, sent, aligned, BITS=_BITS[held])


def mark_not_finite(table: Tensor, flags: Tensor, held: torch.dtype, sent: torch.dtype, aligned: bool) -> None:
    """Set `flags[number]` to 1 for every pair in which a value of `sent`, cast to `held`, is NaN or infinite.

    What is held is not looked at. The arguments are those of `mark_unlike`.
    """
    _launch(_not_finite, table, flags, held, sent, aligned, BITS=_BITS[held], EXPONENT=_EXPONENT[held])


def copy(table: Tensor, held: torch.dtype, sent: torch.dtype, aligned: bool) -> None:
    """Write what was sent, cast to `held`, to where it is held. The arguments are those of `mark_unlike`."""
    _launch(_copy, table, table, held, sent, aligned)


def _launch(
    kernel: Any, table: Tensor, flags: Tensor, held: torch.dtype, sent: torch.dtype, aligned: bool, **constants: Any
) -> None:
    kernel[(table.shape[1],)](
        table, table.shape[1], flags, HELD=_TYPES[held], SENT=_TYPES[sent], ALIGNED=aligned, BLOCK=_BLOCK, **constants
    )


@triton.jit
def _piece(table, pieces, HELD: tl.constexpr, SENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Where this program's piece is held, where it was sent, and its number of values."""
    piece = tl.program_id(0)
    held = tl.load(table + piece).to(tl.pointer_type(HELD))
    sent = tl.load(table + pieces + piece).to(tl.pointer_type(SENT))
    if ALIGNED:
        held = tl.multiple_of(held, 16)
        sent = tl.multiple_of(sent, 16)
    return held, sent, tl.load(table + 2 * pieces + piece)


# In each kernel the whole blocks come first, without a mask, so that loads and stores can be wide.


@triton.jit
def _unlike(
    table, pieces, flags,
    HELD: tl.constexpr, SENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    held, sent, count = _piece(table, pieces, HELD, SENT, ALIGNED)
    lane = tl.arange(0, BLOCK)
    differs = tl.zeros([BLOCK], tl.int32)
    whole = count // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        ours = tl.load(held + begin + lane).to(BITS, bitcast=True)
        theirs = tl.load(sent + begin + lane).to(HELD).to(BITS, bitcast=True)
        differs |= (ours != theirs).to(tl.int32)
    left = whole + lane < count
    ours = tl.load(held + whole + lane, left, other=0.0).to(BITS, bitcast=True)
    theirs = tl.load(sent + whole + lane, left, other=0.0).to(HELD).to(BITS, bitcast=True)
    differs |= (ours != theirs).to(tl.int32)
    if tl.max(differs, 0) > 0:
        tl.store(flags + tl.load(table + 3 * pieces + tl.program_id(0)), 1)


@triton.jit
def _not_finite(
    table, pieces, flags,
    HELD: tl.constexpr, SENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
):  # fmt: skip
    _, sent, count = _piece(table, pieces, HELD, SENT, ALIGNED)
    lane = tl.arange(0, BLOCK)
    bad = tl.zeros([BLOCK], tl.int32)
    whole = count // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        bits = tl.load(sent + begin + lane).to(HELD).to(BITS, bitcast=True)
        bad |= ((bits & EXPONENT) == EXPONENT).to(tl.int32)
    left = whole + lane < count
    bits = tl.load(sent + whole + lane, left, other=0.0).to(HELD).to(BITS, bitcast=True)
    bad |= ((bits & EXPONENT) == EXPONENT).to(tl.int32)
    if tl.max(bad, 0) > 0:
        tl.store(flags + tl.load(table + 3 * pieces + tl.program_id(0)), 1)


@triton.jit
def _copy(
    table, pieces, flags, HELD: tl.constexpr, SENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    held, sent, count = _piece(table, pieces, HELD, SENT, ALIGNED)
    lane = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        tl.store(held + begin + lane, tl.load(sent + begin + lane).to(HELD))
    left = whole + lane < count
    tl.store(held + whole + lane, tl.load(sent + whole + lane, left, other=0.0).to(HELD), left)
