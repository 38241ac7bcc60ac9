"""An update as one batch of copies: for engines whose loading is known to do no more than the copies of a plan.

Whether it does is not taken on trust. The engine's structure must name no reason against it (quantized layers, packed
copies, attention that absorbs weights, tensors kept beside the parameters). Then the first update still goes through
the engine's own loading, and only if that changed weights, every region afterwards holds exactly the bits that a copy
would have left there, and no buffer changed, later updates are copies. A model that computes anything from its weights,
in whatever place, fails one of these and is loaded as ever.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from slipstream.weights.plan import Plan, WeightUpdateError, some
from slipstream.weights.recorder import Region
from slipstream.weights.verify import BITS, check_finite

logger = logging.getLogger(__name__)
_FLOATS = {torch.float32, torch.bfloat16, torch.float16}
_Group = tuple[torch.dtype, torch.dtype]  # of what is held, of what is sent


def obstacle(plan: Plan, parameters: dict[str, Tensor]) -> str | None:
    """Why the regions of a plan are not all that an update of `parameters` takes; None if they are."""
    filled = dict.fromkeys(plan.layouts, 0)
    for region in plan.regions:
        if region.source is None or region.origin is None:
            return f"{region.parameter} is computed from what is sent"
        filled[region.parameter] += torch.Size(region.target.size).numel()
    for name, view in plan.zeros:
        filled[name] += torch.Size(view.size).numel()
    for name, parameter in parameters.items():
        if (tuple(parameter.shape), parameter.stride()) != plan.layouts.get(name):
            return f"{name} has another layout than while it is loaded"
        if filled[name] != parameter.numel():
            return f"{name} is not filled exactly once"
        if parameter.dtype not in _FLOATS:
            return f"{name} is {parameter.dtype}"
    if len({parameter.device for parameter in parameters.values()}) != 1:
        return "the parameters are on several devices"
    return None


@dataclass(frozen=True, slots=True)
class Sent:
    """What is sent in one update, as far as it was looked at.

    Attributes:
        tensors: By name.
        pairs: The regions that no kernel can go through, and the part of `tensors` that each of them gets.
    """

    tensors: dict[str, Tensor]
    pairs: list[tuple[int, Tensor]]


@dataclass(slots=True)
class _Tables:
    """Addresses for the kernels. They hold as long as what is sent lies where it did, and keep none of it alive."""

    addresses: list[tuple[int, torch.dtype]]
    regions: list[tuple[_Group, bool, Tensor]]
    whole: list[tuple[_Group, bool, Tensor]]  # each tensor that is sent, with itself
    others: list[int]  # regions that are strided


class Copies:
    """The copies of a plan into one engine's parameters, with all that can be prepared for the next update.

    It keeps views of the engine's parameters, and of what is sent only addresses, so that no sent tensor lives longer.

    Attributes:
        plan: The plan.
        proven: Whether an update by the engine's own loading has left exactly what these copies would have.
    """

    def __init__(self, plan: Plan, parameters: dict[str, Tensor]) -> None:
        """Prepare them, for a plan without `obstacle`."""
        self.plan = plan
        self.proven = False
        self._identity = _identity(parameters.values())
        self._regions: list[Region] = list(plan.regions)
        self._targets = [region.target.apply(parameters[region.parameter]) for region in self._regions]
        self._zeros = [view.apply(parameters[name]) for name, view in plan.zeros]
        self._device = self._targets[0].device
        self._types = self._types_held()
        self._tables: _Tables | None = None

    def fit(self, plan: Plan, parameters: dict[str, Tensor]) -> bool:
        """Whether they are copies of this plan into these parameters, at the same addresses."""
        return plan is self.plan and self._identity == _identity(parameters.values())

    def look_at(self, tensors: Sequence[tuple[str, Tensor]]) -> Sent | None:
        """What is to be copied; None if a tensor cannot be read in place by the engine's device."""
        sent = dict(tensors)
        for tensor in sent.values():
            plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_contiguous()
            if not plain or tensor.device != self._device or tensor.dtype not in _FLOATS:
                return None
        if self._device.type != "cuda" or not has_kernel():
            return Sent(sent, self._parts(sent, range(len(self._regions))))
        addresses = [(t.data_ptr(), t.dtype) for t in sent.values()]
        if self._tables is None or self._tables.addresses != addresses:
            self._tables = self._tables_of(sent, addresses)
        return Sent(sent, self._parts(sent, self._tables.others))

    def check(self, sent: Sent, finite: bool = False) -> None:
        """Raise WeightUpdateError if a value is not finite, or would not be in the engine's type. Touches nothing.

        Args:
            sent: From `look_at`.
            finite: Whether all values are known to be finite, in the type in which they are sent.
        """
        tensors = sent.tensors
        if finite and all(self._types[name] in (t.dtype, torch.float32) for name, t in tensors.items()):
            return
        if self._tables is not None:
            from slipstream.weights.kernels import mark_not_finite

            bad = self._marked(self._tables.whole, mark_not_finite, len(tensors))
            if not bad:
                return
            names = list(tensors)
            tensors = {names[i]: tensors[names[i]] for i in bad}
        unbounded = self.plan.unbounded()
        check_finite(list(tensors.items()), unbounded)
        # In a type of less range, large values become infinite: above all in float16.
        bounded = [(n, t.detach()) for n, t in tensors.items() if n not in unbounded]
        cast = [(n, t) for n, t in bounded if self._types[n] not in (t.dtype, torch.float32)]
        if cast:
            largest = torch._foreach_norm([tensor for _, tensor in cast], float("inf"))
            fine = torch.stack([m.to(self._types[n]).isfinite() for m, (n, _) in zip(largest, cast, strict=True)])
            infinite = [n for (n, _), ok in zip(cast, fine.tolist(), strict=True) if not ok]
            if infinite:
                held = str(self._types[infinite[0]]).removeprefix("torch.")
                raise WeightUpdateError(
                    f"weight update refused, the engine is unchanged: values that are not finite in {held}, the "
                    f"engine's type, in {some(infinite)}. Let the engine have a type of more range."
                )

    @torch.no_grad()
    def copy(self, sent: Sent) -> None:
        """Make the copies, all of one pair of types in one call."""
        if self._tables is not None:
            from slipstream.weights.kernels import copy

            with torch.cuda.device(self._device):
                for (held, given), aligned, table in self._tables.regions:
                    copy(table, held, given, aligned)
        for pairs in self._groups(sent.pairs).values():
            torch._foreach_copy_([self._targets[i] for i, _ in pairs], [part for _, part in pairs])
        if self._zeros:
            torch._foreach_zero_(self._zeros)

    @torch.no_grad()
    def differing(self, sent: Sent) -> list[str]:
        """Names of what was sent and is not held bit for bit, in the engine's type."""
        wrong: list[int] = []
        if self._tables is not None:
            from slipstream.weights.kernels import mark_unlike

            wrong = self._marked(self._tables.regions, mark_unlike, len(self._regions))
        bits = [_differs(self._targets[i], part) for i, part in sent.pairs]
        bits += [zero.count_nonzero() > 0 for zero in self._zeros]
        found = torch.stack(bits).tolist() if bits else []
        in_parts, in_zeros = found[: len(sent.pairs)], found[len(sent.pairs) :]
        wrong += [i for (i, _), differs in zip(sent.pairs, in_parts, strict=True) if differs]
        names = [self._name(self._regions[i]) for i in sorted(wrong)]
        return names + [f"zeros that pad {name}" for (name, _), d in zip(self.plan.zeros, in_zeros, strict=True) if d]

    def _marked(self, tables: list[tuple[_Group, bool, Tensor]], kernel: Any, count: int) -> list[int]:
        """The pairs, of `count`, that a kernel marks."""
        flags = torch.zeros(count, dtype=torch.int32, device=self._device)
        with torch.cuda.device(self._device):
            for (held, given), aligned, table in tables:
                kernel(table, flags, held, given, aligned)
        return [i for i, flag in enumerate(flags.tolist()) if flag]

    def _parts(self, sent: dict[str, Tensor], indices: Iterable[int]) -> list[tuple[int, Tensor]]:
        """The part of `sent` that each of these regions gets."""
        regions = [(i, self._regions[i]) for i in indices]
        with torch.no_grad():
            return [(i, r.origin.apply(sent[r.source])) for i, r in regions]  # type: ignore[union-attr, index]

    def _tables_of(self, sent: dict[str, Tensor], addresses: list[tuple[int, torch.dtype]]) -> _Tables:
        regions, others = [], []
        for i, part in self._parts(sent, range(len(self._regions))):
            target = self._targets[i]
            if target.is_contiguous() and part.is_contiguous():
                regions.append(((i, target, part), (target.dtype, part.dtype)))
            else:
                others.append(i)
        whole = [((i, t, t), (self._types[name], t.dtype)) for i, (name, t) in enumerate(sent.items())]
        return _Tables(addresses, _tables(regions, self._device), _tables(whole, self._device), others)

    def _types_held(self) -> dict[str, torch.dtype]:
        """The type that each sent tensor is held in: of several, the one of least range."""
        types: dict[str, torch.dtype] = {}
        for region, target in zip(self._regions, self._targets, strict=True):
            name = str(region.source)
            types[name] = min(types.get(name, target.dtype), target.dtype, key=lambda dtype: torch.finfo(dtype).max)
        return types

    def _groups(self, pairs: list[tuple[int, Tensor]]) -> dict[_Group, list[tuple[int, Tensor]]]:
        # Copies of one pair of types are fused into few kernels; of mixed ones, each would be its own.
        groups: dict[_Group, list[tuple[int, Tensor]]] = {}
        for i, part in pairs:
            groups.setdefault((self._targets[i].dtype, part.dtype), []).append((i, part))
        return groups

    @staticmethod
    def _name(region: Region) -> str:
        return str(region.source) if region.source == region.parameter else f"{region.source} (in {region.parameter})"


def _tables(
    pairs: list[tuple[tuple[int, Tensor, Tensor], _Group]], device: torch.device
) -> list[tuple[_Group, bool, Tensor]]:
    """A table for the pairs of each two types, apart by whether they can be read 16 bytes at a time."""
    from slipstream.weights.kernels import table_of

    kinds: dict[tuple[_Group, bool], list[tuple[int, Tensor, Tensor]]] = {}
    for pair, types in pairs:
        if pair[1].numel():
            aligned = pair[1].data_ptr() % 16 == pair[2].data_ptr() % 16 == 0
            kinds.setdefault((types, aligned), []).append(pair)
    return [(types, aligned, table_of(same, device)) for (types, aligned), same in kinds.items()]


@functools.cache
def has_kernel() -> bool:
    """Whether tensors on a GPU are gone through by Triton kernels; else by PyTorch, one after the other."""
    return find_spec("triton") is not None


def _differs(held: Tensor, sent: Tensor) -> Tensor:
    bits = BITS[held.element_size()]
    return (held.view(bits) != sent.to(held.dtype).view(bits)).any()


def _identity(tensors: Iterable[Tensor]) -> list[tuple[object, ...]]:
    return [(t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in tensors]
