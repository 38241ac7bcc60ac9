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

from slipstream.weights.recorder import MARK, Recorder, Region, View

_MOST_REFUSED = 16  # tensors that one error explains; each costs a rehearsal

Signature = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of the tensors of one update, in order."""


class WeightUpdateError(RuntimeError):
    """A weight update was refused, or failed. The message says which tensors, and what the engine holds now."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one update does to an engine, for tensors of one signature.

    Attributes:
        signature: Names and shapes that it holds for.
        regions: Every copy into the engine's parameters.
        layouts: Size and stride of each parameter, and of each of `buffers`, as its weights are loaded, by name.
        zeros: Parameter and part of it that the loading fills with zeros, as where it pads a vocabulary.
        buffers: Names of the engine's buffers that it fills.
    """

    signature: Signature
    regions: tuple[Region, ...]
    layouts: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    zeros: tuple[tuple[str, View], ...] = ()
    buffers: tuple[str, ...] = ()

    def unbounded(self) -> frozenset[str]:
        """Names of sent tensors that fill buffers alone: those may hold infinity, as a clamp without limits does."""
        if not self.buffers:
            return frozenset()
        own = set(self.buffers)
        inside = frozenset(r.source for r in self.regions if r.source and r.parameter in own)
        return inside - {r.source for r in self.regions if r.parameter not in own}


def signature_of(tensors: Sequence[tuple[str, Tensor]]) -> Signature:
    """Names and shapes of `tensors`."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in tensors)


def make_plan(
    parameters: dict[str, Tensor],
    load: Callable[[Iterable[tuple[str, Tensor]]], Any],
    tensors: Sequence[tuple[str, Tensor]],
    buffers: dict[str, Tensor] | None = None,
    *,
    noise: bool = False,
) -> Plan:
    """Rehearse `load` with tensors of the names and shapes of `tensors`, and check that every parameter is filled once.

    So is every buffer that `load` would fill from a checkpoint that has it, and so must every one be that would
    otherwise hold no value that anybody chose: a module of which a part is loaded gets new memory for all of it.

    Args:
        parameters: The engine's parameters by name, as memory-less tensors (tied ones once): `load` writes into them.
        load: The model's own loading.
        tensors: What is to be sent.
        buffers: The engine's buffers that a checkpoint may have, in the same way.
        noise: Whether these hold noise until they are filled.

    Raises:
        WeightUpdateError: A name is sent twice, or unknown to the engine; a shape differs; a parameter would get no
            value, only a part of it, or two. One error names them all.
    """
    twice = sorted(name for name, count in Counter(name for name, _ in tensors).items() if count > 1)
    problems = [f"sent twice: {some(twice)}"] if twice else []
    targets = {**(buffers or {}), **parameters}
    recorder, refused, whole = _rehearse(targets, load, list(dict(tensors).items()))
    if refused:
        more = f" and perhaps others: the first {_MOST_REFUSED} are named" * (len(refused) == _MOST_REFUSED)
        problems.append(f"it cannot take {', '.join(refused.values())}{more}")
    needed = dict(parameters)
    if whole:
        filled = {region.parameter for region in recorder.regions}
        needed |= {n: b for n, b in (buffers or {}).items() if noise or _is_loaded(n, filled, targets, load)}
        problems += _coverage(needed, recorder, {name for name, _ in tensors} - refused.keys(), refused)
    if problems:
        raise WeightUpdateError("weight update refused, the engine is unchanged: " + "; ".join(problems))
    layouts = {name: (tuple(p.shape), p.stride()) for name, p in needed.items()}
    own = tuple(name for name in needed if name not in parameters)
    return Plan(signature_of(tensors), tuple(recorder.regions), layouts, tuple(recorder.zeros), own)


def _is_loaded(
    buffer: str,
    filled: Container[str],
    targets: dict[str, Tensor],
    load: Callable[[Iterable[tuple[str, Tensor]]], Any],
) -> bool:
    """Whether `load` fills a buffer, its module's other tensors, or the buffer if a tensor of its name comes.

    A model that gives it another name in its checkpoint, or has its own way with it, is taken not to load it.
    """
    module = buffer.rpartition(".")[0]
    if buffer in filled or any(n in filled and n.rpartition(".")[0] == module for n in targets):
        return True
    recorder, _, _ = _rehearse(targets, load, [(buffer, targets[buffer])])
    return any(region.parameter == buffer for region in recorder.regions)


def _rehearse(
    parameters: dict[str, Tensor],
    load: Callable[[Iterable[tuple[str, Tensor]]], Any],
    tensors: Sequence[tuple[str, Tensor]],
) -> tuple[Recorder, dict[str, str], bool]:
    """Load without the tensors that loading stops at, found one by one.

    Returns:
        What was recorded in the end, what was refused (name, and why), and whether all others were taken.
    """
    refused: dict[str, str] = {}
    while True:
        blanks = [(name, _blank(tensor)) for name, tensor in tensors if name not in refused]
        recorder = Recorder(parameters, blanks)
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


def _coverage(parameters: dict[str, Tensor], recorder: Recorder, taken: set[str], refused: Container[str]) -> list[str]:
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
        return torch.full(tensor.shape, MARK if tensor.is_floating_point() else 0, dtype=tensor.dtype)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def some(names: Sequence[str], most: int = 8) -> str:
    """The first names of a long list, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
