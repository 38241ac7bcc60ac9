"""Where each sent tensor ends up in an engine: found by a rehearsal of the engine's own loading, checked for coverage.

A rehearsal runs the model's `load_weights` on tensors without memory and records every copy it would make. It follows
whatever the model does on the way (renaming, fusing q, k and v, slicing for tensor parallelism, transposing), so no
table of models is needed, and nothing is touched.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_MOST_REFUSED = 16  # tensors that one error explains; each costs a rehearsal

Signature = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of the tensors of one update, in order."""


class WeightUpdateError(RuntimeError):
    """A weight update was refused, or failed. The message says which tensors, and what the engine holds now."""


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
        parameter: Name of the engine's parameter.
        target: The part of it.
        source: Name of the sent tensor; None if the values are computed from several, or by more than a copy.
        origin: The part of the sent tensor (laid out contiguously); None if `source` is.
    """

    parameter: str
    target: View
    source: str | None
    origin: View | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What one update does to an engine, for tensors of one signature.

    Attributes:
        signature: Names and shapes that it holds for.
        regions: Every copy into the engine's parameters.
        layouts: Size and stride of each parameter as its weights are loaded, by name.
        zeros: Parameter and part of it that the loading fills with zeros, as where it pads a vocabulary.
    """

    signature: Signature
    regions: tuple[Region, ...]
    layouts: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    zeros: tuple[tuple[str, View], ...] = ()


def signature_of(tensors: Sequence[tuple[str, Tensor]]) -> Signature:
    """Names and shapes of `tensors`."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in tensors)


def make_plan(
    parameters: dict[str, Tensor],
    load: Callable[[Iterable[tuple[str, Tensor]]], Any],
    tensors: Sequence[tuple[str, Tensor]],
) -> Plan:
    """Rehearse `load` with tensors of the names and shapes of `tensors`, and check that every parameter is filled once.

    Args:
        parameters: The engine's parameters by name, as memory-less tensors (tied ones once): `load` writes into them.
        load: The model's own loading.
        tensors: What is to be sent.

    Raises:
        WeightUpdateError: A name is sent twice, or unknown to the engine; a shape differs; a parameter would get no
            value, only a part of it, or two. One error names them all.
    """
    twice = sorted(name for name, count in Counter(name for name, _ in tensors).items() if count > 1)
    problems = [f"sent twice: {some(twice)}"] if twice else []
    recorder, refused, whole = _rehearse(parameters, load, list(dict(tensors).items()))
    if refused:
        more = f" and perhaps others: the first {_MOST_REFUSED} are named" * (len(refused) == _MOST_REFUSED)
        problems.append(f"it cannot take {', '.join(refused.values())}{more}")
    if whole:
        problems += _coverage(parameters, recorder, {name for name, _ in tensors} - refused.keys(), refused)
    if problems:
        raise WeightUpdateError("weight update refused, the engine is unchanged: " + "; ".join(problems))
    layouts = {name: (tuple(p.shape), p.stride()) for name, p in parameters.items()}
    return Plan(signature_of(tensors), tuple(recorder.regions), layouts, tuple(recorder.zeros))


def _rehearse(
    parameters: dict[str, Tensor],
    load: Callable[[Iterable[tuple[str, Tensor]]], Any],
    tensors: Sequence[tuple[str, Tensor]],
) -> tuple[_Recorder, dict[str, str], bool]:
    """Load without the tensors that loading stops at, found one by one.

    Returns:
        What was recorded in the end, what was refused (name, and why), and whether all others were taken.
    """
    refused: dict[str, str] = {}
    while True:
        blanks = [(name, _blank(tensor)) for name, tensor in tensors if name not in refused]
        recorder = _Recorder(parameters, blanks)
        reached, all_read = "none", False

        def noting(blanks: list[tuple[str, Tensor]] = blanks) -> Iterable[tuple[str, Tensor]]:
            nonlocal reached, all_read
            for name, blank in blanks:
                reached = name
                yield name, blank
            all_read = True

        try:
            with torch.no_grad(), recorder:
                load(noting())
            return recorder, refused, True
        except (AssertionError, KeyError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            shape = dict(signature_of(tensors)).get(reached)
            refused[reached] = f"{reached!r} of shape {shape} ({type(error).__name__}: {error})"
        # What fails when all was read is the fault of no single tensor.
        if all_read or reached == "none" or len(refused) == _MOST_REFUSED:
            return recorder, refused, False


def _coverage(
    parameters: dict[str, Tensor], recorder: _Recorder, taken: set[str], refused: Container[str]
) -> list[str]:
    """What is wrong with the values that parameters get from `taken`. One of a refused name was not forgotten."""
    filled: dict[str, int] = defaultdict(int)
    twice = set()
    for (name, view), count in Counter((r.parameter, r.target) for r in recorder.regions).items():
        filled[name] += count * torch.Size(view.size).numel()
        if count > 1:
            twice.add(name)
    missing, partly = [], []
    for name, parameter in parameters.items():
        # Rows that pad the vocabulary are filled with zeros by the loader.
        wanted = parameter.numel() - recorder.zeroed[name]
        if filled[name] == 0 and name not in refused:
            missing.append(name)
        elif 0 < filled[name] < wanted:
            partly.append(f"{name} ({filled[name]} of {wanted} values)")
        elif filled[name] > parameter.numel():
            twice.add(name)
    problems = {
        "missing": missing,
        f"incomplete (a part of a fused module was not sent{' or not taken' * bool(refused)})": partly,
        "filled twice": sorted(twice),
        "unexpected (the engine has no use for them)": sorted(taken - recorder.used),
    }
    return [f"{what}: {some(names)}" for what, names in problems.items() if names]


def _blank(tensor: Tensor) -> Tensor:
    # Loaders read single values with .item(), which a tensor without memory cannot give.
    if tensor.numel() == 1:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def some(names: Sequence[str], most: int = 8) -> str:
    """The first names of a long list, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class _Recorder(TorchDispatchMode):
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
            self.regions.append(Region(parameter[0], view, None, None))
            self.used |= self._scalar
            self._scalar = frozenset()
            return
        self.zeroed[parameter[0]] += target.numel()
        if not isinstance(value, Tensor) and value == 0:
            self.zeros.append((parameter[0], view))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
