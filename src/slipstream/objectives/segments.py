"""Sums over the rows of a flat batch.

Tokens of all rows stand one after the other, without padding: a value per token has shape (N,), a value per row (B,),
and `rows_N` says which row a token belongs to. Everything in `objectives/` is written on this layout.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_sum(values_N: Tensor, rows_N: Tensor, rows: int) -> Tensor:
    """Sum of each row's token values, shape (rows,). Differentiable."""
    return torch.zeros(rows, dtype=values_N.dtype, device=values_N.device).index_add(0, rows_N, values_N)


def row_mean(values_N: Tensor, mask_N: Tensor, rows_N: Tensor, rows: int) -> Tensor:
    """Mean of each row's values where the mask is 1, shape (rows,); 0 for a row without any. Differentiable."""
    total = row_sum(values_N * mask_N, rows_N, rows)
    return total / row_sum(mask_N, rows_N, rows).clamp(min=1.0)
