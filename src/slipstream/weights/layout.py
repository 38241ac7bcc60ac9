"""Where the tensors of an update lie, one after the other, in one piece of memory. Both sides compute it; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from slipstream.serving.wire import TensorSpec

ALIGNMENT = 64  # of every tensor, in bytes: any dtype can be read in place, and so can whole cache lines
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LARGEST_TENSOR = 1 << 50  # values; torch cannot describe one of more than 63 bits


def unsendable(specs: Sequence[TensorSpec]) -> str:
    """What is wrong with the types of `specs`; empty if nothing is."""
    wrong = [f"{spec.name} ({spec.dtype})" for spec in specs if spec.dtype not in ITEM_BYTES]
    shown = ", ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
    return f"of a type that cannot be sent (it must be one of {', '.join(ITEM_BYTES)}): {shown}" if wrong else ""


def bytes_of(spec: TensorSpec) -> int:
    """Bytes of one tensor.

    Raises:
        ValueError: its dtype cannot be sent, or a dimension is negative, or too large for anybody's memory.
    """
    if spec.dtype not in ITEM_BYTES:
        raise ValueError(f"{spec.name}: dtype {spec.dtype!r} cannot be sent; it must be one of {', '.join(ITEM_BYTES)}")
    if any(size < 0 for size in spec.shape):
        raise ValueError(f"{spec.name}: shape {spec.shape} has a negative dimension")
    if math.prod(max(size, 1) for size in spec.shape) > LARGEST_TENSOR:
        raise ValueError(f"{spec.name}: shape {spec.shape} is too large")
    return math.prod(spec.shape) * ITEM_BYTES[spec.dtype]


def layout(specs: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """Offset of each tensor in bytes, and the bytes of them all; each offset and the total are 64-byte aligned."""
    offsets, end = [], 0
    for spec in specs:
        offsets.append(end)
        end += -(-bytes_of(spec) // ALIGNMENT) * ALIGNMENT
    return offsets, end
