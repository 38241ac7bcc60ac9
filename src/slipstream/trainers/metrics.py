"""Metrics of a step: collected on the device in pieces, reduced over ranks once."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from slipstream.objectives.advantages import combine_rewards, nanstd
from slipstream.records import Rollout


class Tally:
    """Means, minima and maxima over the micro-batches of a step, without waiting for the device.

    Every rank must tally the same names.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def mean(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        """Add values to the weighted mean `name`."""
        values = values.detach().float()
        weights = torch.ones_like(values) if weights is None else weights.detach().float()
        total, count = (values * weights).sum(), weights.sum()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts[name] + count if name in self._counts else count

    def max(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        """Add values to the maximum `name`; those of weight 0 do not count."""
        values = values.detach().float()
        if weights is not None:
            values = torch.where(weights > 0, values, -math.inf)
        highest = values.max() if values.numel() else torch.tensor(-math.inf, device=values.device)
        self._maxima[name] = torch.maximum(self._maxima[name], highest) if name in self._maxima else highest

    def min(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        """Add values to the minimum `name`; those of weight 0 do not count."""
        self.max(f"-{name}", -values.detach().float(), weights)

    def reduce(self, accelerator: Any) -> dict[str, float]:
        """The values over all ranks, by name; a mean over nothing and an extremum of nothing are left out."""
        result: dict[str, float] = {}
        if self._sums:
            names = sorted(self._sums)
            packed = torch.stack([torch.stack([self._sums[n], self._counts[n]]) for n in names])
            for name, (total, count) in zip(names, accelerator.reduce(packed, "sum").tolist(), strict=True):
                if count:
                    result[name] = total / count
        if self._maxima:
            names = sorted(self._maxima)
            gathered = accelerator.gather(torch.stack([self._maxima[n] for n in names]).unsqueeze(0))
            for name, value in zip(names, gathered.amax(dim=0).tolist(), strict=True):
                if math.isfinite(value):
                    result[name.removeprefix("-")] = -value if name.startswith("-") else value
        return result


class Metrics:
    """Named values that are averaged between two logs.

    Args:
        values: What has been taken already, by name.
    """

    def __init__(self, values: dict[str, list[float]] | None = None) -> None:
        self.values: dict[str, list[float]] = defaultdict(list, values or {})

    def add(self, values: dict[str, float]) -> None:
        """Take one value a name."""
        for name, value in values.items():
            self.values[name].append(value)

    def flush(self) -> dict[str, float | None]:
        """Averages since the last flush; NaN values are left out, and a name with nothing else is None."""
        averages: dict[str, float | None] = {}
        for name, values in self.values.items():
            valid = [v for v in values if not math.isnan(v)]
            averages[name] = sum(valid) / len(valid) if valid else None
        self.values.clear()
        return averages


class Clock:
    """Seconds spent in each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time spent inside. Inside another phase, it is taken from that one."""
        start, inner = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] += elapsed - (sum(self.seconds.values()) - inner)

    def flush(self) -> dict[str, float]:
        """Seconds by phase since the last flush."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


def reward_metrics(rewards_RF: Tensor, weights_F: Tensor, names: Sequence[str], group_size: int) -> dict[str, float]:
    """Means and standard deviations of the rewards of all ranks: in sum, and by function; and the share of prompts
    whose completions differ in nothing, if there are several of each.

    Args:
        rewards_RF: Rewards by function (NaN: not scored), the `group_size` completions of a prompt side by side.
        weights_F: Weight of each function in the sum.
        names: Name of each function.
        group_size: Completions of each prompt.
    """
    total_R = combine_rewards(rewards_RF, weights_F)
    metrics = {"reward": total_R.nanmean(), "reward_std": nanstd(total_R, dim=0)}
    if group_size > 1:
        stds = nanstd(total_R.view(-1, group_size), dim=1)
        metrics["frac_reward_zero_std"] = torch.isclose(stds, torch.zeros_like(stds)).float().mean()
    for i, name in enumerate(names):
        metrics[f"rewards/{name}/mean"] = rewards_RF[:, i].nanmean()
        metrics[f"rewards/{name}/std"] = nanstd(rewards_RF[:, i], dim=0)
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))


def length_metrics(rollouts: Sequence[Rollout], accelerator: Any) -> dict[str, float]:
    """Lengths of the completions of all ranks, in tokens, and how many were cut off at the largest length.

    Only tokens that the policy wrote itself count. Where every completion was cut off, the lengths of terminated ones
    are 0.
    """
    lengths = torch.tensor([r.own_tokens for r in rollouts], dtype=torch.float32, device=accelerator.device)
    truncated = torch.tensor([r.truncated for r in rollouts], dtype=torch.float32, device=accelerator.device)
    tally = Tally()
    for kind, weights in (("", None), ("_terminated", 1 - truncated)):
        tally.mean(f"completions/mean{kind}_length", lengths, weights)
        tally.min(f"completions/min{kind}_length", lengths, weights)
        tally.max(f"completions/max{kind}_length", lengths, weights)
    tally.mean("completions/clipped_ratio", truncated)
    metrics = dict.fromkeys((f"completions/{k}_terminated_length" for k in ("mean", "min", "max")), 0.0)
    return metrics | tally.reduce(accelerator)


def tool_metrics(rollouts: Sequence[Rollout], accelerator: Any) -> dict[str, float]:
    """How many calls of tools a completion has on average, over all ranks, and which share of them failed."""
    calls = torch.tensor([r.extra["tool_calls"] for r in rollouts], dtype=torch.float32, device=accelerator.device)
    failures = torch.tensor([r.extra["tool_failures"] for r in rollouts], dtype=torch.float32, device=calls.device)
    tally = Tally()
    tally.mean("tools/call_frequency", calls)
    tally.mean("tools/failure_frequency", failures / calls.clamp(min=1), calls)
    return {"tools/failure_frequency": 0.0} | tally.reduce(accelerator)


def mean_by_name(values: dict[str, list[float]]) -> dict[str, float]:
    """The mean of each name's values over all ranks, which may have different names."""
    everyone: list[dict[str, list[float]]] = [values]
    if torch.distributed.is_initialized() and (ranks := torch.distributed.get_world_size()) > 1:
        everyone = [{} for _ in range(ranks)]
        torch.distributed.all_gather_object(everyone, values)
    names = sorted({name for one in everyone for name in one})
    together = {name: [v for one in everyone for v in one.get(name, [])] for name in names}
    return {name: sum(v) / len(v) for name, v in together.items()}
