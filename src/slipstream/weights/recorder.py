"""Records what a model's loading writes, and from which of the tensors that it is given, instead of writing it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MARK = -0.8359375  # of a sent single value, in every type: a loader that fills with it computes nothing


@dataclass(frozen=True, slots=True)
class View:
    """Geometry of a strided view, with its offset counted from the start of the tensor it is a view of."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        """The view that `tensor` is of its storage."""
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def apply(self, tensor: Tensor) -> Tensor:
        """The same view of another tensor (of the layout that the plan was made for)."""
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class Region:
    """A part of an engine parameter, and the part of a sent tensor that fills it.

    Attributes:
        parameter: Name of the engine's parameter, or of a buffer that is loaded as one.
        target: The part of it.
        source: Name of the sent tensor; None if the values are computed from several, or by more than a copy.
        origin: The part of the sent tensor (laid out contiguously); None if `source` is.
    """

    parameter: str
    target: View
    source: str | None
    origin: View | None


class Recorder(TorchDispatchMode):
    """Notes copies into parameters instead of making them, and which sent tensors each value came from."""

    def __init__(self, parameters: dict[str, Tensor], sent: Sequence[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.regions: list[Region] = []
        self.used: set[str] = set()
        self.zeroed: dict[str, int] = defaultdict(int)
        self.zeros: list[tuple[str, View]] = []
        self._targets = {_storage(p): (name, int(p.storage_offset())) for name, p in parameters.items()}
        self._sent = {_storage(tensor): name for name, tensor in sent}
        self._origins = {storage: frozenset([name]) for storage, name in self._sent.items()}
        self._scalar: frozenset[str] = frozenset()
        self._alive: list[Tensor] = []  # a freed storage's id could be given out again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten.copy_.default:
            self._note(args[0], args[1])
            return args[0]
        if func in (aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default):
            self._note_fill(args[0], args[1] if len(args) > 1 else 0)
            return args[0]
        if func is aten._local_scalar_dense.default:
            self._scalar = self._origins.get(_storage(args[0]), frozenset())
        out = func(*args, **(kwargs or {}))
        inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        origins = frozenset().union(*(self._origins.get(_storage(t), frozenset()) for t in inputs))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and origins:
                self._alive.append(tensor)
                self._origins.setdefault(_storage(tensor), origins)
        return out

    def _note(self, target: Tensor, source: Tensor) -> None:
        origins = self._origins.get(_storage(source), frozenset())
        parameter = self._targets.get(_storage(target))
        if parameter is None:  # a temporary
            self._alive.append(target)
            self._origins[_storage(target)] = self._origins.get(_storage(target), frozenset()) | origins
            return
        name, start = parameter
        source.expand(target.shape)  # a real copy would fail on shapes that do not fit
        self.used |= origins
        sent = self._sent.get(_storage(source)) if source.numel() == target.numel() else None
        view = View(tuple(target.shape), target.stride(), int(target.storage_offset()) - start)
        self.regions.append(Region(name, view, sent, View.of(source) if sent else None))

    def _note_fill(self, target: Tensor, value: Any) -> None:
        parameter = self._targets.get(_storage(target))
        if parameter is None:
            return
        view = View(tuple(target.shape), target.stride(), int(target.storage_offset()) - parameter[1])
        if self._scalar:
            self.regions.append(self._scalar_region(parameter[0], view, value))
            self.used |= self._scalar
            self._scalar = frozenset()
            return
        self.zeroed[parameter[0]] += target.numel()
        if not isinstance(value, Tensor) and value == 0:
            self.zeros.append((parameter[0], view))

    def _scalar_region(self, parameter: str, view: View, value: Any) -> Region:
        """What filling with a number that was read from sent tensors does: a copy if it is the one value of one."""
        sources = list(self._scalar)
        if len(sources) > 1 or torch.Size(view.size).numel() > 1 or float(value) != MARK:
            return Region(parameter, view, None, None)
        return Region(parameter, view, sources[0], View(view.size, view.stride, 0))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
