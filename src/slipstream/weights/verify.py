"""Proof that an engine holds what was sent: checksums of the bits, and probes of layers that keep a packed copy.

Everything is collected on the device and read once before a load and once after it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.weights.plan import Plan, WeightUpdateError, some
from slipstream.weights.recorder import Region

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PROBED_COLUMNS = 8


def checksum(tensor: Tensor) -> Tensor:
    """Sum of the values' bits read as integers, each half of a row's sum times an odd number, modulo 2**64.

    Args:
        tensor: Any shape and strides; rows are all but the last dimension, each value of a vector is a row.

    Returns:
        An int64 scalar on the tensor's device: equal for equal bits, different when a value or the order of rows is.
        Changes within a row that add up to none go unseen: values that change places, the signs of two values that
        both end a 64-bit word.
    """
    size, count = tensor.element_size(), tensor.shape[:-1].numel() if tensor.ndim > 1 else tensor.numel()
    flat = tensor.detach().reshape(-1).contiguous()
    if not flat.numel():
        return torch.zeros((), dtype=torch.int64, device=flat.device)
    if tensor.ndim > 1 and tensor.shape[-1] * size % 8 == 0:
        # Read as 64-bit words: PyTorch adds those up ten times faster on CPU than integers it has to widen.
        if flat.storage_offset() * size % 8:
            flat = flat.clone()
        rows = flat.view(torch.int64).view(count, -1).sum(-1)
    else:
        rows = flat.view(BITS[size]).view(count, -1).sum(-1, dtype=torch.int64)
    # By halves: times any factor, the highest bit of a sum would be its own negative, and two of them vanish.
    return (rows.view(torch.int32) * _factors(2 * count, rows.device)).sum()


@functools.lru_cache(maxsize=64)
def _factors(count: int, device: torch.device) -> Tensor:
    """Odd numbers without pattern: with 1, 3, 5, ... changes of the same size in several rows could add up to none."""
    generator = torch.Generator().manual_seed(count)
    return (torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1).to(device)


@dataclass(frozen=True, slots=True)
class Probe:
    """A layer that computes with a copy of a parameter in a layout of its own.

    Attributes:
        layer: Name for messages.
        parameter: Name of the parameter, in the plan, that it is a copy of: a matrix (outputs, inputs).
        apply: Multiplies rows (m, inputs) by the transposed copy; returns (m, outputs).
        dtype: Type of its inputs.
    """

    layer: str
    parameter: str
    apply: Callable[[Tensor], Tensor]
    dtype: torch.dtype


class Expectation:
    """What an engine must hold after an update, computed from the sent tensors before they are loaded.

    Attributes:
        unverified: Parameters that it knows no way to check: their loading computes values, or the engine changes their
            layout and offers no probe.
    """

    def __init__(
        self, plan: Plan, tensors: Sequence[tuple[str, Tensor]], parameters: dict[str, Tensor],
        probes: Sequence[Probe], finite: bool = False,
    ) -> None:  # fmt: skip
        """Compute it.

        Args:
            plan: Where the tensors go.
            tensors: What is sent.
            parameters: The engine's parameters as they are now, by name.
            probes: Layers with packed copies.
            finite: Whether all values are known to be finite, in the type in which they are sent.

        Raises:
            WeightUpdateError: A sent tensor has values that are not finite.
        """
        sent = dict(tensors)
        kept = {n for n, p in parameters.items() if (tuple(p.shape), p.stride()) == plan.layouts[n]}
        probed = {probe.parameter for probe in probes}
        dtypes = {n: p.dtype for n, p in parameters.items()}
        self.unverified = sorted(
            {r.parameter for r in plan.regions if r.source is None} | (set(plan.layouts) - kept - probed)
        )
        self._regions: list[tuple[Region, Tensor]] = []
        self._answers: dict[str, list[tuple[Region, Tensor, Tensor]]] = {name: [] for name in probed}
        self._rows = {n: _probe_rows(plan.layouts[n][0][1], dtypes[n]) for n in probed}
        self._probes = probes
        multiplied: list[tuple[str, Tensor]] = []
        narrowed: dict[str, Tensor] = {}
        read = set(sent) if finite else set()
        for region in plan.regions:
            if region.source is None or region.origin is None:
                continue
            value = region.origin.apply(sent[region.source].detach().contiguous()).to(dtypes[region.parameter])
            if region.parameter in probed:
                product, columns = _answer(value, self._rows[region.parameter])
                self._answers[region.parameter].append((region, product, columns))
                multiplied.append((region.source, product))
                # A product with a vector that has no zero is not finite where a row is not: no second reading. But all
                # ranks must refuse alike, also those that get another part.
                read |= {region.source} if value.numel() == sent[region.source].numel() else set()
            if region.parameter in kept:
                self._regions.append((region, checksum(value)))
            if value.dtype == torch.float16 != sent[region.source].dtype and region.source not in narrowed:
                narrowed[region.source] = sent[region.source].detach().abs().max().half()  # large ones become infinite
        unread = [(name, tensor) for name, tensor in tensors if name not in read]
        check_finite([*multiplied, *narrowed.items(), *unread], plan.unbounded())

    def check(self, parameters: dict[str, Tensor]) -> None:
        """Raise WeightUpdateError naming every sent tensor that the engine does not hold as it was sent."""
        wrong = []
        if self._regions:
            held = torch.stack([checksum(r.target.apply(parameters[r.parameter])) for r, _ in self._regions])
            expected = torch.stack([e.to(held.device) for _, e in self._regions])
            differs = (held != expected).tolist()
            wrong = [f"{r.source} (in {r.parameter})" for (r, _), d in zip(self._regions, differs, strict=True) if d]
        wrong += [f"{probe.layer} (packed copy)" for probe in self._probes if not self._agrees(probe)]
        if wrong:
            raise WeightUpdateError(f"what the engine holds differs from what was sent: {some(wrong)}")

    def _agrees(self, probe: Probe) -> bool:
        rows = self._rows[probe.parameter]
        out = probe.apply(rows).float()
        tolerance = 4e-6 if probe.dtype == torch.float32 else 2e-2  # of the norm; rounding of sums of products
        for region, product, columns in self._answers[probe.parameter]:
            begin = region.target.offset // rows.shape[1]
            got = out[:, begin : begin + len(product)]
            if not torch.equal(got[1:], columns) or (got[0] - product).norm() > tolerance * product.norm():
                return False
        return True


def check_finite(tensors: Sequence[tuple[str, Tensor]], unbounded: Container[str] = ()) -> None:
    """Raise WeightUpdateError if a tensor has a value that is not finite. One transfer a device.

    Args:
        tensors: By name.
        unbounded: Names of those that may hold infinity, but no NaN.
    """
    groups: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors:
        values = tensor.detach()
        if name in unbounded:
            values = values.nan_to_num(nan=float("nan"), posinf=0.0, neginf=0.0)
        groups.setdefault(tensor.device, []).append((name, values))
    bad = []
    for group in groups.values():
        # A sum of magnitudes is finite exactly if all values are, far from the largest float.
        sums = torch._foreach_norm([tensor for _, tensor in group], 1, dtype=torch.float32)
        fine = torch.stack(list(sums)).isfinite().tolist()
        bad += [name for (name, _), ok in zip(group, fine, strict=True) if not ok]
    if bad:
        raise WeightUpdateError(
            f"weight update refused, the engine is unchanged: values that are not finite (NaN or infinity) in "
            f"{some(bad)}. Training has diverged: look at the last steps' loss and gradient norm."
        )


def _probe_rows(columns: int, dtype: torch.dtype) -> Tensor:
    """(1 + k, columns): a random row, which sees every value, and k unit rows, which give a column each, exactly."""
    picked = _picked(columns)
    rows = torch.zeros(1 + len(picked), columns)
    noise = torch.randn(columns, generator=torch.Generator().manual_seed(columns))
    rows[0] = noise.clamp(-3, 3) + noise.sign() * 0.125
    rows[torch.arange(1, len(picked) + 1), picked] = 1.0
    return rows.to(dtype)


def _picked(columns: int) -> Tensor:
    return torch.linspace(0, columns - 1, min(columns, _PROBED_COLUMNS)).long()


def _answer(weight: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer with this weight (outputs, inputs) must answer: (outputs,) and (k, outputs), in float32."""
    return (weight @ rows[0]).float(), weight.index_select(1, _picked(rows.shape[1])).t().float()
