"""Log-probabilities of a token a row, by as many programs a row as keep the GPU busy.

vLLM's own kernel goes through a row with one program, twice: for 128 rows of 152 thousand logits that takes longer than
sampling them does.

Imports Triton: import it where one is there. Legend: P rows, V vocabulary, K parts of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PART = 8192


def token_logps(logits_PV: Tensor, tokens_P: Tensor) -> Tensor:
    """Log-probabilities (P,), float32, of one token of each row, computed in float32. The same every time.

    Args:
        logits_PV: Of any floating dtype; a row's lie side by side.
        tokens_P: Token ids, an integer dtype, without gaps.
    """
    rows, size = logits_PV.shape
    parts = triton.cdiv(size, _PART)
    largest_PK, total_PK = torch.empty((2, rows, parts), dtype=torch.float32, device=logits_PV.device)
    logps_P = torch.empty(rows, dtype=torch.float32, device=logits_PV.device)
    _look[(rows, parts)](logits_PV, logits_PV.stride(0), size, largest_PK, total_PK, PART=_PART, num_warps=8)
    _join[(rows,)](
        logits_PV, logits_PV.stride(0), tokens_P, largest_PK, total_PK, parts, logps_P,
        WIDTH=triton.next_power_of_2(parts), num_warps=1,
    )  # fmt: skip
    return logps_P


@triton.jit
def _look(logits, stride, size, largest, total, PART: tl.constexpr):
    """Of a part of a row: its largest logit, and the sum of exponentials relative to that."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    at = part * PART + tl.arange(0, PART)
    x = tl.load(logits + row * stride + at, mask=at < size, other=float("-inf")).to(tl.float32)
    most = tl.max(x, axis=0)
    # Where none of the part may be sampled, the sum is 0 and not the undefined -inf + inf.
    relative = x - tl.where(most == float("-inf"), 0.0, most)
    tl.store(largest + row * parts + part, most)
    tl.store(total + row * parts + part, tl.sum(tl.exp(relative), axis=0))


@triton.jit
def _join(logits, stride, tokens, largest, total, parts, logps, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, WIDTH)
    most = tl.load(largest + row * parts + part, mask=part < parts, other=float("-inf"))
    sums = tl.load(total + row * parts + part, mask=part < parts, other=0.0)
    top = tl.max(most, axis=0)
    x = tl.load(logits + row * stride + tl.load(tokens + row)).to(tl.float32)
    tl.store(logps + row, x - top - tl.log(tl.sum(sums * tl.exp(most - top), axis=0)))
