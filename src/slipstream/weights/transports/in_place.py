"""Weights handed by reference to an engine in the same process."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from slipstream.vllm_compat import mixture
from slipstream.vllm_compat import model as engine_model
from slipstream.weights.plan import Plan, WeightUpdateError, make_plan, signature_of, some
from slipstream.weights.verify import Expectation

logger = logging.getLogger(__name__)


class LoadFailedError(WeightUpdateError):
    """An update failed after loading had begun: the engine holds a mixture of weights."""


@dataclass(slots=True)
class Timings:
    """Seconds an update spent on planning (first update only), checking what was sent, loading, and verifying."""

    plan: float = 0.0
    check: float = 0.0
    load: float = 0.0
    verify: float = 0.0


def plan_for(worker: Any, tensors: Sequence[tuple[str, Tensor]], plan: Plan | None, part: str = mixture.POLICY) -> Plan:
    """`plan` if it is for tensors of these names and shapes, else a new one. Their values are not looked at.

    Raises:
        WeightUpdateError: The tensors do not make a whole update.
    """
    if plan is not None and plan.signature == signature_of(tensors):
        return plan
    with engine_model.rehearsal(mixture.part(worker, part)) as (parameters, load):
        return make_plan(parameters, load, tensors)


def update(
    worker: Any,
    tensors: Sequence[tuple[str, Tensor]],
    plan: Plan | None,
    part: str = mixture.POLICY,
    *,
    first: bool = False,
) -> tuple[Plan, Timings]:
    """Replace a worker's weights by `tensors`, wholly or not at all. Runs in the worker, as one collective call.

    Args:
        worker: vLLM's worker in this process.
        tensors: Every weight of the model, under its checkpoint name.
        plan: From `plan_for`, or of an earlier update of this part; reused if names and shapes are the same.
        part: Whose weights: `mixture.POLICY`, or `mixture.REFERENCE` in an engine that was made with one.
        first: Whether no update has used `plan` yet: what cannot be verified is then reported.

    Returns:
        The plan for the next update, and where the time went.

    Raises:
        WeightUpdateError: Refused; the engine is as it was.
        LoadFailedError: Loading failed half way, or what the engine holds afterwards is not what was sent.
    """
    timings, clock = Timings(), _Clock()
    given, plan = plan, plan_for(worker, tensors, plan, part)
    worker = mixture.part(worker, part)
    first |= plan is not given
    timings.plan = clock.lap()
    probes = engine_model.packed_layers(worker)
    expectation = Expectation(plan, tensors, engine_model.parameters(worker), probes)
    if expectation.unverified and first:
        logger.warning(
            "the engine computes or rearranges %d of its %d parameters while it loads them, so they cannot be compared "
            "with what was sent: %s", len(expectation.unverified), len(plan.layouts), some(expectation.unverified),
        )  # fmt: skip
    timings.check = clock.lap()
    try:
        engine_model.load_weights(worker, tensors)
        timings.load = clock.lap()
        expectation.check(engine_model.parameters(worker))
        timings.verify = clock.lap()
    except Exception as error:
        raise LoadFailedError(
            f"loading had begun when the weight update failed: {error}. The engine answers again after a whole update."
        ) from error
    return plan, timings


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
