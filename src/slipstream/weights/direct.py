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
from importlib.util import find_spec

import torch
from torch import Tensor

from slipstream.weights.plan import Plan, Region, WeightUpdateError, some
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
        self._tables: tuple[object, list[tuple[_Group, bool, Tensor]], list[int]] | None = None

    def fit(self, plan: Plan, parameters: dict[str, Tensor]) -> bool:
        """Whether they are copies of this plan into these parameters, at the same addresses."""
        return plan is self.plan and self._identity == _identity(parameters.values())

    def sources(self, tensors: Sequence[tuple[str, Tensor]]) -> list[Tensor] | None:
        """The part of `tensors` that each region gets; None if one cannot be read in place by the engine's device."""
        sent = dict(tensors)
        for tensor in sent.values():
            plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_contiguous()
            if not plain or tensor.device != self._device or tensor.dtype not in _FLOATS:
                return None
        with torch.no_grad():
            return [r.origin.apply(sent[r.source]) for r in self._regions]  # type: ignore[union-attr, index]

    def check(self, tensors: Sequence[tuple[str, Tensor]], sources: Sequence[Tensor]) -> None:
        """Raise WeightUpdateError if a value is not finite, or would not be in the engine's type. Touches nothing."""
        check_finite(tensors)
        # In float16 large values become infinite.
        narrowed = [
            (region.source or "", source)
            for region, target, source in zip(self._regions, self._targets, sources, strict=True)
            if target.dtype == torch.float16 != source.dtype
        ]
        if narrowed:
            largest = torch._foreach_norm([source for _, source in narrowed], float("inf"))
            fine = torch.stack([value.to(torch.float16) for value in largest]).isfinite().tolist()
            bad = [name for (name, _), ok in zip(narrowed, fine, strict=True) if not ok]
            if bad:
                raise WeightUpdateError(
                    f"weight update refused, the engine is unchanged: values that are not finite in float16, the "
                    f"engine's type, in {some(bad)}. Let the engine have bfloat16 or float32."
                )

    @torch.no_grad()
    def copy(self, sources: Sequence[Tensor]) -> None:
        """Make the copies, all of one pair of types in one call."""
        for indices in self._groups(sources).values():
            torch._foreach_copy_([self._targets[i] for i in indices], [sources[i] for i in indices])
        if self._zeros:
            torch._foreach_zero_(self._zeros)

    @torch.no_grad()
    def differing(self, sources: Sequence[Tensor]) -> list[str]:
        """Names of what was sent and is not held bit for bit, in the engine's type. One transfer from the device."""
        marked = self._by_kernel(sources)
        if marked is None:
            marked = range(len(self._regions))
        bits = [_differs(self._targets[i], sources[i]) for i in marked]
        bits += [zero.count_nonzero() > 0 for zero in self._zeros]
        if not bits:
            return []
        names = [self._name(self._regions[i]) for i in marked]
        names += [f"zeros that pad {name}" for name, _ in self.plan.zeros]
        return [name for name, differs in zip(names, torch.stack(bits).tolist(), strict=True) if differs]

    def _by_kernel(self, sources: Sequence[Tensor]) -> Sequence[int] | None:
        """The regions that a kernel finds different, and those it cannot read; None if there is no kernel here."""
        if self._device.type != "cuda" or not has_kernel():
            return None
        from slipstream.weights.compare_kernel import mark

        tables, others = self._prepared(sources)
        flags = torch.zeros(len(sources), dtype=torch.int32, device=self._device)
        with torch.cuda.device(self._device):
            for (held, sent), aligned, table in tables:
                mark(table, flags, held, sent, aligned)
        return sorted([*others, *flags.nonzero()[:, 0].tolist()])

    def _prepared(self, sources: Sequence[Tensor]) -> tuple[list[tuple[_Group, bool, Tensor]], list[int]]:
        """Tables of addresses for the kernel, and the regions that are strided; made anew when addresses change."""
        from slipstream.weights.compare_kernel import table_of

        identity = [(source.data_ptr(), source.dtype) for source in sources]
        if self._tables is None or self._tables[0] != identity:
            tables, others = [], []
            for group, indices in self._groups(sources).items():
                halves: dict[bool, list[tuple[int, Tensor, Tensor]]] = {True: [], False: []}
                for i in indices:
                    target, source = self._targets[i], sources[i]
                    if not (target.is_contiguous() and source.is_contiguous()):
                        others.append(i)
                    elif target.numel():
                        aligned = target.data_ptr() % 16 == source.data_ptr() % 16 == 0
                        halves[aligned].append((i, target, source))
                tables += [(group, half, table_of(pairs, self._device)) for half, pairs in halves.items() if pairs]
            self._tables = identity, tables, others
        return self._tables[1:]

    def _groups(self, sources: Sequence[Tensor]) -> dict[_Group, list[int]]:
        # Copies of one pair of types are fused into few kernels; of mixed ones, each would be its own.
        groups: dict[_Group, list[int]] = {}
        for i, (target, source) in enumerate(zip(self._targets, sources, strict=True)):
            groups.setdefault((target.dtype, source.dtype), []).append(i)
        return groups

    @staticmethod
    def _name(region: Region) -> str:
        return str(region.source) if region.source == region.parameter else f"{region.source} (in {region.parameter})"


@functools.cache
def has_kernel() -> bool:
    """Whether tensors on a GPU are compared by the Triton kernel; else by PyTorch, one after the other."""
    return find_spec("triton") is not None


def _differs(held: Tensor, sent: Tensor) -> Tensor:
    bits = BITS[held.element_size()]
    return (held.view(bits) != sent.to(held.dtype).view(bits)).any()


def _identity(tensors: Iterable[Tensor]) -> list[tuple[object, ...]]:
    return [(t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in tensors]
