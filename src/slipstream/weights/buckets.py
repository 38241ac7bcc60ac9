"""Tensors as the bytes of their layout: cast, checksummed, cut into buckets on one side, read in place on the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from slipstream.serving.wire import TensorSpec
from slipstream.weights.layout import bytes_of, layout
from slipstream.weights.verify import checksum

_EXACT_VALUES = 1 << 22  # of a tensor that stays float32; and of all of them, if not a share of what is sent
_EXACT_SHARE = 16
_ROW = 512  # 64-bit words of a bucket that its checksum takes together


def bucket_checksum(bucket: Tensor) -> Tensor:
    """An int64 scalar that tells whether a bucket, a uint8 vector of its layout, arrived as it was sent."""
    words = bucket.view(torch.int64)
    whole = len(words) // _ROW * _ROW
    return checksum(words[:whole].view(-1, _ROW)) + checksum(words[whole:])


def names_in(specs: Sequence[TensorSpec], size: int, index: int) -> list[str]:
    """Tensors of which a part lies in bucket `index` of `size` bytes."""
    begin, end = index * size, (index + 1) * size
    offsets = layout(specs)[0]
    return [s.name for s, at in zip(specs, offsets, strict=True) if at < end and at + bytes_of(s) > begin]


class Inspection:
    """Checksums of buckets that arrive, one after the other, and whether their values are finite.

    Args:
        specs: Of the tensors in them.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._runs = _runs(specs)
        self._at = 0  # of the layout, where the next bucket begins
        self._sums: list[Tensor] = []
        self._largest: list[Tensor] = []

    def look_at(self, bucket: Tensor) -> None:
        """Take the next bucket. Nothing waits for the device."""
        self._sums.append(bucket_checksum(bucket))
        at, end = self._at, self._at + len(bucket)
        values: dict[torch.dtype, list[Tensor]] = {}
        for begin, stop, dtype in self._runs:
            if begin < end and stop > at:
                values.setdefault(dtype, []).append(bucket[max(begin - at, 0) : stop - at].view(dtype))
        for same in values.values():
            if len(same) == 1:
                self._largest.append(torch.linalg.vector_norm(same[0], float("inf"), dtype=torch.float32))
            else:
                self._largest += torch._foreach_norm(same, float("inf"), dtype=torch.float32)
        self._at = end

    def found(self) -> tuple[list[int], bool]:
        """The checksums, and whether all values are finite. What lies between tensors may be anything."""
        sums = torch.stack(self._sums).tolist() if self._sums else []
        return sums, bool(self._largest) and bool(torch.stack(self._largest).isfinite().all())


def _runs(specs: Sequence[TensorSpec]) -> list[tuple[int, int, torch.dtype]]:
    """Parts of the layout, begin and end in bytes, that can be read as one type."""
    offsets, total = layout(specs)
    if len({spec.dtype for spec in specs}) == 1:
        return [(0, total, getattr(torch, specs[0].dtype))] if total else []
    runs: list[tuple[int, int, torch.dtype]] = []
    for spec, begin in zip(specs, offsets, strict=True):
        dtype, end = getattr(torch, spec.dtype), begin + bytes_of(spec)
        if runs and runs[-1][1:] == (begin, dtype):
            runs[-1] = (runs[-1][0], end, dtype)
        elif end > begin:
            runs.append((begin, end, dtype))
    return runs


def specs_of(tensors: Iterable[tuple[str, Tensor]], dtype: str) -> list[TensorSpec]:
    """What is sent for `tensors` to an engine that computes in `dtype`.

    Types of 16 bits travel as they are; float32 is cast to `dtype`, which the engine would do otherwise, except where
    it may hold more (see `_exact`). Others cannot be sent: their specs have them all the same, for the error that names
    everything that does not fit.
    """
    own = [TensorSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors]
    exact = _exact(own)
    return [
        TensorSpec(spec.name, dtype if spec.dtype == "float32" and i not in exact else spec.dtype, spec.shape)
        for i, spec in enumerate(own)
    ]


def _exact(specs: Sequence[TensorSpec]) -> set[int]:
    """Which tensors of float32 stay what they are: some engines of 16 bits hold single weights in float32.

    Those are small (decays of state space models, a mixture's routers and their biases), and which they are the engine
    alone knows. So the smallest of all stay: up to a size, and as long as they add little to what is sent.
    """
    sizes = sorted((math.prod(spec.shape), i) for i, spec in enumerate(specs) if spec.dtype == "float32")
    left = max(_EXACT_VALUES, sum(size for size, _ in sizes) // _EXACT_SHARE)
    exact = set()
    for size, i in sizes:
        left -= size
        if left < 0 or size > _EXACT_VALUES:
            break
        exact.add(i)
    return exact


def matched(specs: Sequence[TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[TensorSpec, Tensor]]:
    """Each spec with its tensor.

    Raises:
        ValueError: the tensors are not those of the specs, in their order.
    """
    sent = 0
    for index, (name, tensor) in enumerate(tensors):
        if index == len(specs):
            raise ValueError(f"tensor {name!r} comes after the last of the {len(specs)} that were announced")
        spec = specs[index]
        if (name, tuple(tensor.shape)) != (spec.name, tuple(spec.shape)):
            raise ValueError(
                f"tensor {index} is {name!r} of shape {tuple(tensor.shape)}, but {spec.name!r} of shape "
                f"{tuple(spec.shape)} was announced in its place"
            )
        sent += 1
        yield spec, tensor.detach()
    if sent < len(specs):
        raise ValueError(f"{sent} tensors came of the {len(specs)} that were announced; {specs[sent].name!r} is next")


def views(memory: Tensor, specs: Sequence[TensorSpec]) -> list[tuple[str, Tensor]]:
    """The tensors that lie in `memory`, a uint8 vector that begins with the layout of `specs`; nothing is copied."""
    return [
        (spec.name, memory[at : at + bytes_of(spec)].view(getattr(torch, spec.dtype)).view(spec.shape))
        for spec, at in zip(specs, layout(specs)[0], strict=True)
    ]


class Packer:
    """Cuts tensors into the buckets of their layout: all `size` bytes long but the last.

    Args:
        specs: What was announced.
        tensors: Their values, in the same order, on any device.
        size: Bytes of a bucket: a multiple of the layout's alignment.
        take: Called with a bucket's index; returns the uint8 vector of at least `size` bytes that it is written to.
            Casts and checksums happen on that vector's device.
        sums: Whether to compute checksums of the tensors.

    Attributes:
        checksums: Of the tensors packed so far, as int64 scalars.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        tensors: Iterable[tuple[str, Tensor]],
        size: int,
        take: Callable[[int], Tensor],
        sums: bool = True,
    ) -> None:
        self.checksums: list[Tensor] = []
        self._sums = sums
        self._specs, self._tensors, self._size, self._take = specs, tensors, size, take

    def __iter__(self) -> Iterator[Tensor]:
        """Yield each bucket when it is full. It may be overwritten once `take` gives its memory out again."""
        offsets, total = layout(self._specs)
        size, index = self._size, -1
        bucket: Tensor | None = None
        for (spec, tensor), offset in zip(matched(self._specs, self._tensors), offsets, strict=True):
            if bucket is None:
                memory = self._take(0) if total else torch.empty(0, dtype=torch.uint8)
                bucket, index = memory[: min(size, total)], 0
            data = tensor.to(device=bucket.device, dtype=getattr(torch, spec.dtype)).contiguous()
            if self._sums:
                self.checksums.append(checksum(data))
            source, at = data.reshape(-1).view(torch.uint8), 0
            while at < len(source):
                if (offset + at) // size > index:
                    yield bucket
                    index += 1
                    bucket = self._take(index)[: min(size, total - index * size)]
                begin = (offset + at) % size
                part = source[at : at + size - begin]
                bucket[begin : begin + len(part)].copy_(part)
                at += len(part)
        if bucket is not None and total:
            yield bucket

    def totals(self) -> list[int]:
        """The checksums, read from the device at once."""
        return torch.stack(self.checksums).tolist() if self.checksums else []
