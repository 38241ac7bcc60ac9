"""Weights handed by reference to an engine in the same process."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slipstream.vllm_compat import mixture
from slipstream.vllm_compat import model as engine_model
from slipstream.weights.direct import Copies, Sent, obstacle
from slipstream.weights.plan import Plan, WeightUpdateError, make_plan, signature_of, some
from slipstream.weights.verify import Expectation

logger = logging.getLogger(__name__)
# By the engine's model, and gone with it: they hold views of its parameters.
_copies: weakref.WeakKeyDictionary[Any, Copies | _Loaded] = weakref.WeakKeyDictionary()


class LoadFailedError(WeightUpdateError):
    """An update failed after loading had begun: the engine holds a mixture of weights."""


@dataclass(slots=True)
class Timings:
    """Seconds an update spent on planning (first update only), checking what was sent, loading, and verifying.

    Attributes:
        direct: Whether the weights were copied into place, instead of going through the engine's own loading.
    """

    plan: float = 0.0
    check: float = 0.0
    load: float = 0.0
    verify: float = 0.0
    direct: bool = False


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model whose loading is more than the copies of this plan."""

    plan: Plan


def plan_for(worker: Any, tensors: Sequence[tuple[str, Tensor]], plan: Plan | None, part: str = mixture.POLICY) -> Plan:
    """`plan` if it is for tensors of these names and shapes, else a new one. Their values are not looked at.

    Raises:
        WeightUpdateError: The tensors do not make a whole update.
    """
    if plan is not None and plan.signature == signature_of(tensors):
        return plan
    with engine_model.rehearsal(mixture.part(worker, part)) as model:
        return make_plan(model.parameters, model.load, tensors, model.buffers, noise=model.noise)


def update(
    worker: Any,
    tensors: Sequence[tuple[str, Tensor]],
    plan: Plan | None,
    part: str = mixture.POLICY,
    *,
    first: bool = False,
    direct: bool = True,
    finite: bool = False,
) -> tuple[Plan, Timings]:
    """Replace a worker's weights by `tensors`, wholly or not at all. Runs in the worker, as one collective call.

    Args:
        worker: vLLM's worker in this process.
        tensors: Every weight of the model, under its checkpoint name.
        plan: From `plan_for`, or of an earlier update of this part; reused if names and shapes are the same.
        part: Whose weights: `mixture.POLICY`, or `mixture.REFERENCE` in an engine that was made with one.
        first: Whether no update has used `plan` yet: what cannot be verified is then reported.
        direct: Whether the tensors may be copied straight into place where that is all their loading does, see
            `slipstream.weights.direct`.
        finite: Whether all values are known to be finite.

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
    copies = _copies_for(worker, plan) if direct else None
    sent = None if copies is None else copies.look_at(tensors)
    if copies is not None and sent is not None and copies.proven:
        _copy(worker, copies, sent, timings, clock, finite=finite)
        return plan, timings
    proof = None if copies is None or sent is None else _Proof(worker, copies, sent)
    _load(worker, plan, tensors, timings, clock, report=first, finite=finite)
    if proof is not None:
        proof.finish()
        timings.verify += clock.lap()
    return plan, timings


def _load(
    worker: Any, plan: Plan, tensors: Sequence[tuple[str, Tensor]], timings: Timings, clock: _Clock, *, report: bool,
    finite: bool,
) -> None:  # fmt: skip
    """Update by the engine's own loading, and compare checksums."""
    probes = engine_model.packed_layers(worker)
    expectation = Expectation(plan, tensors, engine_model.parameters(worker, plan.buffers), probes, finite)
    if expectation.unverified and report:
        logger.warning(
            "the engine computes or rearranges %d of its %d parameters while it loads them, so they cannot be compared "
            "with what was sent: %s", len(expectation.unverified), len(plan.layouts), some(expectation.unverified),
        )  # fmt: skip
    timings.check = clock.lap()
    try:
        engine_model.load_weights(worker, tensors)
        timings.load = clock.lap()
        expectation.check(engine_model.parameters(worker, plan.buffers))
        timings.verify = clock.lap()
    except Exception as error:
        raise _failed(worker, error) from error


def _copy(worker: Any, copies: Copies, sent: Sent, timings: Timings, clock: _Clock, *, finite: bool) -> None:
    """Update by copies, and compare every bit."""
    timings.direct = True
    copies.check(sent, finite)
    timings.check = clock.lap()
    try:
        copies.copy(sent)
        timings.load = clock.lap()
        wrong = copies.differing(sent)
        if wrong:
            raise WeightUpdateError(f"what the engine holds differs from what was sent: {some(wrong)}")
        timings.verify = clock.lap()
        logger.debug("weights: %s", timings)
    except Exception as error:
        raise _failed(worker, error) from error


def _failed(worker: Any, error: Exception) -> LoadFailedError:
    _copies.pop(engine_model.model_of(worker), None)  # the next update goes through the engine's loading
    return LoadFailedError(
        f"loading had begun when the weight update failed: {error}. The engine answers again after a whole update."
    )


def _copies_for(worker: Any, plan: Plan) -> Copies | None:
    """The copies that are an update by `plan`, proven or not; None if it takes more."""
    model, parameters = engine_model.model_of(worker), engine_model.parameters(worker, plan.buffers)
    known = _copies.get(model)
    if isinstance(known, Copies) and known.fit(plan, parameters):
        return known
    if isinstance(known, _Loaded) and known.plan is plan:
        return None
    why = obstacle(plan, parameters) or engine_model.more_than_copies(worker)
    if why:
        logger.debug("weights go through the engine's own loading: %s", why)
        _copies[model] = _Loaded(plan)
        return None
    copies = _copies[model] = Copies(plan, parameters)
    return copies


class _Proof:
    """Looks at an update by the engine's loading: whether the copies alone would have left the same."""

    def __init__(self, worker: Any, copies: Copies, sent: Sent) -> None:
        self._worker, self._copies, self._sent = worker, copies, sent
        self._changes = bool(copies.differing(sent))  # else a buffer made from weights would not change either
        # What the plan fills is compared like parameters.
        self._before = [buffer.clone() for buffer in engine_model.buffers(worker, copies.plan.buffers)]

    def finish(self) -> None:
        """Note what was found: proven, no copies, or to be looked at again since the weights were the same."""
        after = engine_model.buffers(self._worker, self._copies.plan.buffers)
        kept = len(after) == len(self._before) and all(
            a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
            for a, b in zip(after, self._before, strict=True)
        )
        wrong = self._copies.differing(self._sent)
        if not kept or wrong:
            logger.info("weights go through the engine's own loading, which does more than copies: %s", some(wrong))
            _copies[engine_model.model_of(self._worker)] = _Loaded(self._copies.plan)
        elif self._changes:
            self._copies.proven = True


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
