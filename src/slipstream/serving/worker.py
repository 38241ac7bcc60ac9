"""What runs in each of a replica's workers: receiving new weights beside generation, and loading them.

vLLM mixes `Extension` into its worker class (`worker_extension_cls`). Everything that goes through `collective_rpc` is
plain data, so that it may cross process boundaries; errors come back as data, too, to be told apart.

Importing this module binds the life of the process to that of its parent: workers import it, trainers do not.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from torch import Tensor

from slipstream.lifetime import die_with_parent
from slipstream.serving import machine
from slipstream.serving.wire import TensorSpec
from slipstream.vllm_compat import mixture, on_cpu
from slipstream.vllm_compat import model as engine_model
from slipstream.vllm_compat.process import uncompile_sampler
from slipstream.weights.buckets import names_in
from slipstream.weights.plan import Plan, WeightUpdateError, some
from slipstream.weights.transports import group, in_place, shared_memory
from slipstream.weights.verify import check_finite, checksum

logger = logging.getLogger(__name__)
T = TypeVar("T")

OK, REFUSED, FAILED, ERROR = "ok", "refused", "failed", "error"
"""What becomes of a call: done; refused, the old weights serve; loading failed half way; anything else went wrong."""

PLAIN_SPEC = tuple[str, str, Sequence[int]]
"""A `TensorSpec` as plain data."""

die_with_parent()
mixture.install()  # vLLM imports this module before it makes the model
if on_cpu():
    uncompile_sampler()


class Extension:
    """The method that vLLM's worker gets."""

    def slipstream(self, verb: str, *arguments: Any) -> tuple[str, Any]:
        """Call a method of this worker's `Receiver`; returns (what became of it, result or message)."""
        receiver = self.__dict__.setdefault("_slipstream_receiver", None) or Receiver(self)
        self.__dict__["_slipstream_receiver"] = receiver
        try:
            return OK, getattr(receiver, verb)(*arguments)
        except in_place.LoadFailedError as error:
            return FAILED, str(error)
        except (WeightUpdateError, NotImplementedError) as error:
            return REFUSED, str(error)
        except Exception as error:
            logger.exception("%s failed", verb)
            return ERROR, f"{type(error).__name__}: {error}"


class Receiver:
    """One worker's side of weight updates: one at a time, and a process group that lasts over many.

    Args:
        worker: vLLM's worker.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._part = mixture.POLICY
        self._plans: dict[str, Plan] = {}
        self._new_plans: set[str] = set()  # parts whose plan no update has used
        self._specs: list[TensorSpec] = []
        self._arriving: Future[Arrived] | None = None
        self._through_group = False
        self._group: Future[Any] | None = None

    def device(self) -> str:
        """UUID of the accelerator; empty on a CPU. Asked for when a replica starts.

        Raises:
            NotImplementedError: The engine's CUDA graphs would give wrong tokens.
        """
        engine_model.check_graphs(self._worker)
        device = self._worker.device
        return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""

    def shares(self, path: str, nonce: bytes) -> tuple[bool, str]:
        """Whether this process sees a file in shared memory, and the name of its loopback."""
        return machine.holds(path, nonce), machine.loopback()

    def set_mixture(self, share: float) -> None:
        """Sample with this share of the reference from now on."""
        mixture.set_mixture(self._worker, share)

    def begin(self, specs: Sequence[PLAIN_SPEC], part: str, grouped: bool) -> None:
        """Check that tensors of these names and shapes make a whole update of the policy or of the reference.

        Args:
            grouped: Whether to receive them through the process group from now on.

        Raises:
            WeightUpdateError: they do not, or there is no process group.
        """
        self.abort()
        engine_model.check_updatable(self._worker)
        self._specs = [TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in specs]
        blanks = [(s.name, torch.empty(s.shape, dtype=getattr(torch, s.dtype), device="meta")) for s in self._specs]
        known = self._plans.get(part)
        plan = in_place.plan_for(self._worker, blanks, known, part)
        if plan is not known:
            self._new_plans.add(part)
        self._part, self._plans[part] = part, plan
        if grouped:
            self._receive()

    def _receive(self) -> None:
        if self._group is None:
            raise WeightUpdateError("there is no process group; make one with POST /communicator")
        joined, specs, unbounded = self._group, self._specs, self._plans[self._part].unbounded()

        def receive() -> Arrived:
            members = joined.result()
            came = group.receive(members, specs, members.device)
            return Arrived(came.tensors, came.checksums, members.bucket_bytes, finite=came.finite, unbounded=unbounded)

        self._arriving, self._through_group = in_background("receive", receive), True

    def read(self, path: str, offset: int) -> None:
        """Begin to read the announced tensors from shared memory, where they are complete."""
        specs, unbounded = self._specs, self._plans[self._part].unbounded()
        self._arriving = in_background(
            "read", lambda: Arrived(shared_memory.read(path, offset, specs), unbounded=unbounded)
        )
        self._through_group = False

    def arrived(self, checksums: Sequence[int]) -> bool:
        """Whether all tensors are here, and are those that were sent.

        Raises:
            WeightUpdateError: they are not, or receiving them failed.
        """
        if self._arriving is None:
            raise WeightUpdateError("no weight update is under way")
        if not self._arriving.done():
            return False
        if error := self._arriving.exception():
            raise WeightUpdateError(f"weight update refused: receiving failed: {error}") from error
        here = self._arriving.result()
        if len(checksums) != len(here.checksums):
            raise WeightUpdateError(
                f"weight update refused: {len(checksums)} checksums came, and {len(here.checksums)} are needed"
            )
        differ = [i for i, sums in enumerate(zip(here.checksums, checksums, strict=True)) if sums[0] != sums[1]]
        if differ:
            if here.bucket_bytes is None:
                wrong = [here.tensors[i][0] for i in differ]
            else:
                names = (name for i in differ for name in names_in(self._specs, here.bucket_bytes, i))
                wrong = list(dict.fromkeys(names))
            raise WeightUpdateError(
                f"weight update refused, the engine is unchanged: what arrived differs from what was sent (checksum): "
                f"{some(wrong)}"
            )
        if here.refusal:
            raise WeightUpdateError(here.refusal)
        return True

    def load(self) -> None:
        """Replace the weights by what arrived."""
        assert self._arriving is not None
        tensors = self._arriving.result().tensors
        part = self._part
        in_place.update(self._worker, tensors, self._plans[part], part, first=part in self._new_plans, finite=True)
        self._new_plans.discard(part)
        self.abort()

    def abort(self) -> None:
        """Drop what has arrived, and leave a process group in which something is still to come or has failed."""
        arriving, self._arriving = self._arriving, None
        if arriving is not None and self._through_group and (not arriving.done() or arriving.exception() is not None):
            self.leave()

    def join(
        self, backend: str, url: str, api_key: str, prefix: str, first_rank: int, world_size: int, timeout: float
    ) -> None:
        """Begin to join a process group, in which the trainer is rank 0 and this worker `first_rank` plus its own."""
        self.leave()
        rank = first_rank + self._worker.rank
        device = self._worker.device if backend == "nccl" else torch.device("cpu")

        def join() -> Any:
            store = group.HttpStore(url, api_key, prefix, timeout)
            return group.join(backend, store, rank, world_size, timeout, device)

        self._group = in_background("join", join)

    def leave(self) -> None:
        """Leave the process group. An update that it brings fails."""
        joined, self._group = self._group, None
        if joined is None:
            return
        joined.add_done_callback(lambda made: None if made.exception() else group.leave(made.result()))


class Arrived:
    """Tensors of an update that are complete, and the checksums to compare.

    Args:
        tensors: By checkpoint names.
        checksums: Of the buckets they came in; None: one of each tensor is computed.
        bucket_bytes: Size of these buckets.
        finite: Whether all values are known to be finite.
        unbounded: Names of tensors that may hold infinity.

    Attributes:
        refusal: What is wrong with values that are not finite; empty if all are. They are looked for here, beside
            generation, so that the pause in which weights are loaded need not look.
    """

    def __init__(
        self,
        tensors: list[tuple[str, Tensor]],
        checksums: list[int] | None = None,
        bucket_bytes: int | None = None,
        *,
        finite: bool = False,
        unbounded: frozenset[str] = frozenset(),
    ) -> None:
        self.tensors = tensors
        self.bucket_bytes = bucket_bytes
        if checksums is None:
            # Read once: on an accelerator each reading waits for the device.
            checksums = torch.stack([checksum(t) for _, t in tensors]).tolist() if tensors else []
        self.checksums = checksums
        self.refusal = ""
        if not finite:
            try:
                check_finite(tensors, unbounded)
            except WeightUpdateError as error:
                self.refusal = str(error)


def in_background(name: str, work: Callable[[], T]) -> Future[T]:
    """Run `work` in a thread of its own, which does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001
            logger.warning("%s failed: %s: %s", name, type(error).__name__, error)
            # The traceback's frames hold the future, and the memory for what was to arrive, in a cycle.
            link: BaseException | None = error
            while link is not None:
                link.__traceback__, link = None, link.__cause__ or link.__context__
            future.set_exception(error)

    threading.Thread(target=run, name=f"slipstream-{name}", daemon=True).start()
    return future
