"""Attention within the segments of a packed row.

transformers' models look their attention function and the function that makes its mask up by a name in their
configuration. Here are a pair of them: the "mask" says what the row consists of, and reaches every layer, also when
gradient checkpointing runs it a second time.

Legend: T tokens of the row, K keys, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from slipstream.modeling.sending import sent
from slipstream.modeling.short_segments import Batches, batches_of
from slipstream.records import Segment

NAME = "slipstream_packed"
# What some models hand to their attention function and this one does not compute.
UNKNOWN_TERMS = ("softcap", "s_aux", "position_bias", "head_mask")
# What the setter of `_attn_implementation` writes; the setter would also write to the parts of a configuration.
_ATTRIBUTE = "_attn_implementation_internal"


@dataclass(frozen=True)
class Layout:
    """The segments of a row, and what attention needs to know about them, made once for all layers.

    Args:
        segments: From left to right, without a gap.
        device: Where the tensors go.
    """

    segments: tuple[Segment, ...]
    device: torch.device

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [s.length for s in self.segments]

    @cached_property
    def key_lengths(self) -> list[int]:
        """Tokens that each segment attends to: its parent's and its own."""
        return [s.length + (0 if s.parent is None else self.lengths[s.parent]) for s in self.segments]

    @cached_property
    def query_ends(self) -> Tensor:
        """Where segments begin and end among the queries, int32."""
        return self._ends(self.lengths)

    @cached_property
    def key_ends(self) -> Tensor:
        """The same among the keys, which are repeated for each segment that continues them."""
        return self._ends(self.key_lengths)

    @cached_property
    def key_index_K(self) -> Tensor | None:
        """Which tokens are the keys; None: all of them as they are."""
        if all(s.parent is None for s in self.segments):
            return None
        starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        parts = []
        for start, segment in zip(starts, self.segments, strict=False):
            if segment.parent is not None:
                parts.append((starts[segment.parent], self.lengths[segment.parent]))
            parts.append((start, segment.length))
        first, count = torch.tensor(parts).T
        shift = first - (count.cumsum(0) - count)
        return sent(torch.arange(int(count.sum())) + shift.repeat_interleave(count), self.device)

    @cached_property
    def _bands(self) -> dict[tuple[int, int, int | None], Tensor]:
        return {}

    def band(self, queries: int, keys: int, window: int | None) -> Tensor:
        """Who sees whom, (queries, keys), where the queries are the last of the keys."""
        key = (queries, keys, window)
        if key not in self._bands:
            seen = torch.ones(queries, keys, dtype=torch.bool, device=self.device).tril(keys - queries)
            self._bands[key] = seen if window is None else seen.triu(keys - queries - window + 1)
        return self._bands[key]

    @cached_property
    def _batches(self) -> dict[int | None, Batches]:
        return {}

    def batches(self, window: int | None) -> Batches:
        """Which segments attend together."""
        if window not in self._batches:
            self._batches[window] = batches_of(self.segments, window, self.device)
        return self._batches[window]

    def prepare(self) -> None:
        """Make what flash attention needs now, and not while the device waits for the first layer."""
        _ = self.query_ends, self.key_ends, self.key_index_K

    def _ends(self, lengths: Sequence[int]) -> Tensor:
        return sent(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), self.device)


class Mask(NamedTuple):
    """What layers are given as their mask: the row's layout, and how many tokens back they look (None: all)."""

    layout: Layout
    window: int | None


_row: ContextVar[Layout | None] = ContextVar("row", default=None)


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Let `model` attend within the segments of packed rows, and as before afterwards.

    A backward pass belongs into it as well: gradient checkpointing computes attention again. It may be nested.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), _ATTRIBUTE)}
    before = [(config, getattr(config, _ATTRIBUTE)) for config in configs.values()]
    try:
        for config in configs.values():
            setattr(config, _ATTRIBUTE, NAME)
        yield
    finally:
        for config, value in before:
            setattr(config, _ATTRIBUTE, value)


def is_packed(model: nn.Module) -> bool:
    """Whether `model` attends within segments now."""
    return any(getattr(getattr(m, "config", None), _ATTRIBUTE, None) == NAME for m in model.modules())


@contextmanager
def row_of(layout: Layout) -> Iterator[None]:
    """Forward passes in it see a row of these segments."""
    token = _row.set(layout)
    try:
        yield
    finally:
        _row.reset(token)


@torch.compiler.disable
def _mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Mask:
    layout = _row.get()
    if layout is None:
        raise RuntimeError(
            "the model was called with a plain batch while it attends within packed rows: call it outside "
            "`packed_attention`, or score a packed micro-batch with `score_tokens`."
        )
    return Mask(layout, local_size)


@torch.compiler.disable
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row: (1, heads, T, D) to (1, T, heads, D)."""
    unknown = [name for name in UNKNOWN_TERMS if kwargs.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"{type(module).__name__} uses {', '.join(unknown)}, which packed rows do not have.")
    if not isinstance(attention_mask, Mask):
        raise NotImplementedError(f"{type(module).__name__} makes its attention mask itself.")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    attend = _flash if _has_flash(query, key, value) else _short_together
    return attend(query, key, value, *attention_mask, scaling, dropout), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)


def _has_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the flash attention that comes with torch takes these, forward and backward."""
    if not query.is_cuda or any(x.dtype not in (torch.float16, torch.bfloat16) for x in (query, key, value)):
        return False
    head_dim = query.shape[-1]
    return head_dim == value.shape[-1] and head_dim % 8 == 0 and head_dim <= _largest_head_dim(query.device)


@lru_cache
def _largest_head_dim(device: torch.device) -> int:
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return 0
    # Others have too little shared memory for the backward pass of larger heads.
    return 256 if capability in ((8, 0), (9, 0), (10, 0)) else 192


def _flash(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: int | None, scale: float | None, dropout: float
) -> Tensor:
    # The operator below torch.nn.attention.varlen, whose signature has changed from version to version.
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if layout.key_index_K is not None:
        key, value = _gather(key, layout.key_index_K), _gather(value, layout.key_index_K)
    ends = (layout.query_ends, layout.key_ends, max(layout.lengths), max(layout.key_lengths))
    # Queries are the last of their keys, which is how the kernel aligns both.
    band = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    attended = torch.ops.aten._flash_attention_forward.default(
        query, key, value, *ends, dropout, window is None, False, scale=scale, **band
    )[0]
    return attended.unsqueeze(0)


def _short_together(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: int | None, scale: float | None, dropout: float
) -> Tensor:
    plan = layout.batches(window)
    gqa = query.shape[1] != key.shape[1]
    attend = nn.functional.scaled_dot_product_attention
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    attended = []
    for batch in plan.batches:
        indices = (batch.queries_SQ, batch.keys_SK, batch.keys_SK)
        q, k, v = (
            _gather(x, index.flatten()).unflatten(0, index.shape).transpose(1, 2)
            for x, index in zip(rows, indices, strict=True)
        )
        done = attend(q, k, v, batch.seen_SQK.unsqueeze(1), dropout, scale=scale, enable_gqa=gqa)
        attended.append(done.transpose(1, 2).flatten(0, 1))
    parts = [x.split(layout.lengths, dim=2) for x in (query, key, value)] if plan.alone else []
    for i in plan.alone:
        segment = layout.segments[i]
        q, k, v = (x[i] for x in parts)
        if segment.parent is not None:
            k, v = (torch.cat([x[segment.parent], x[i]], 2) for x in parts[1:])
        plain = segment.parent is None and (window is None or window >= segment.length)
        band = None if plain else layout.band(segment.length, k.shape[2], window)
        attended.append(attend(q, k, v, band, dropout, plain, scale=scale, enable_gqa=gqa)[0].transpose(0, 1))
    return torch.cat(attended).index_select(0, plan.order_T).unsqueeze(0)


class _Gather(torch.autograd.Function):
    """Rows of a tensor, some of them several times; their gradients are added up in float32."""

    @staticmethod
    def forward(ctx: Any, rows_TX: Tensor, index_K: Tensor) -> Tensor:
        ctx.save_for_backward(index_K)
        ctx.rows = len(rows_TX)
        return rows_TX.index_select(0, index_K)

    @staticmethod
    def backward(ctx: Any, gradient_KX: Tensor) -> tuple[Tensor, None]:
        (index_K,) = ctx.saved_tensors
        total = torch.zeros(ctx.rows, *gradient_KX.shape[1:], dtype=torch.float32, device=gradient_KX.device)
        return total.index_add_(0, index_K, gradient_KX.float()).to(gradient_KX.dtype), None


def _gather(rows_TX: Tensor, index_K: Tensor) -> Tensor:
    return _Gather.apply(rows_TX, index_K)
