"""vLLM behind `slipstream vllm-serve`: each rank sends its own prompts, rank 0 sends the weights."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from slipstream.generation.engine import EngineLostError, OnFinished, Request, Sampling, SyncReport
from slipstream.records import Completion
from slipstream.serving.client import ServerError, VLLMClient
from slipstream.serving.devices import check_devices_apart, uuid_of

if TYPE_CHECKING:
    import torch

    from slipstream.serving.wire import TensorSpec


class ServerEngine:
    """A generation server as an engine. All ranks make one each, and update weights together.

    Args:
        url: Of the server.
        device: That the policy is trained on: an accelerator's weights travel by NCCL, a CPU's by shared memory.
        timeout: Seconds to wait for the server, at the start and whenever it is lost.
        max_model_len: Longest prompt plus completion that the trainer will ask for, or None.
        reference: Whether completions of a reference model, or of a mixture with it, will be asked for.

    Attributes:
        version: Version of the weights that serve; None before the first update and after the server was lost.

    Raises:
        ConnectionError: there is no server at `url` within `timeout`.
        ValueError: the server cannot do what the trainer will ask for.
    """

    def __init__(
        self,
        url: str,
        *,
        device: torch.device,
        timeout: float,
        max_model_len: int | None = None,
        reference: bool = False,
    ) -> None:
        self.version: int | None = None
        self._device, self._timeout = device, timeout
        self._client = VLLMClient(base_url=url, connection_timeout=timeout)
        self._connected = False
        self._update = ""
        self._specs: list[TensorSpec] | None = None
        info = self._client.server_info()
        if device.type == "cuda":
            # Every rank's own; before NCCL starts, which would wait for itself.
            check_devices_apart([uuid_of(device)], [uuid for replica in info.replicas for uuid in replica.devices])
        self._dtype = info.dtype
        if max_model_len is not None and max_model_len > info.max_model_len:
            raise ValueError(
                f"vllm_max_model_length={max_model_len}, but the server at {url} was started with --max-model-len "
                f"{info.max_model_len}: restart it with a larger one, or lower vllm_max_model_length."
            )
        if reference and not info.reference:
            raise ValueError(
                f"the server at {url} has no reference model to sample from: start it with "
                "`slipstream vllm-serve --reference`."
            )

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus completion, in tokens."""
        return self._client.server_info().max_model_len

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """Sample `requests[i].n` completions for each request, in order; `on_finished` hears of each while others run.

        Raises:
            EngineLostError: the server does not answer, or serves other weights than this trainer's last ones.
            ValueError: a prompt and `max_tokens` do not fit, or an option is unknown.
        """
        if self.version is None:
            raise RuntimeError("generate: no weights yet; call update_weights first")
        with self._losing("generate"):
            completions = self._client.sample(requests, sampling, self.version, self._update, on_finished)
        if any(completion.version_runs for group in completions for completion in group):
            raise EngineLostError("generate: another trainer sent its weights to the server meanwhile; give it its own")
        return completions

    def update_weights(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> SyncReport:
        """Replace the server's weights by `tensors`, wholly or not at all. Called by all ranks; rank 0 sends.

        Raises:
            EngineLostError: the server, or the way to it, was lost.
            WeightUpdateError: the server refused them: it serves the version that it had.
        """
        report = self._together(version, tensors, reference=False)
        self.version, self._update = version, report.update
        return report

    def update_reference(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> SyncReport:
        """Replace the weights of the server's reference model, in the same way."""
        return self._together(0, tensors, reference=True)

    def recover(self) -> None:
        """Wait until the server can be reached again. The weights have to be sent again afterwards.

        Raises:
            ConnectionError: it cannot be reached within the timeout.
        """
        self.version, self._connected = None, False
        self._client.wait(self._timeout)

    def sleep(self, level: int = 1) -> None:
        """Raise RuntimeError: the server's devices are its own."""
        raise RuntimeError("sleep: a server's devices are its own; set vllm_enable_sleep_mode=False")

    def wake(self, tags: Sequence[str] | None = None) -> None:
        """Raise RuntimeError: it never sleeps."""
        raise RuntimeError("wake: a server never sleeps")

    def close(self) -> None:
        """Leave the server, which goes on."""
        self.version = None
        self._client.close()

    def _send(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]], reference: bool) -> SyncReport:
        with self._losing("update_weights"):
            if not self._connected:
                self._client.init_communicator(self._device)
                self._connected = True
            return self._client.update_weights(version, tensors, specs=self._specs, reference=reference)

    def _together(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]], reference: bool) -> SyncReport:
        """Let rank 0 send; all ranks return its report, or raise its error.

        Sharded weights are gathered by all ranks, one after the other: every rank walks through all of them.
        """
        import torch.distributed as dist

        from slipstream.weights.buckets import specs_of

        if iter(tensors) is tensors:  # can be walked through once
            tensors = list(tensors)
        if self._specs is None:
            # The server checks names and shapes before it takes a byte.
            self._specs = specs_of(tensors, self._dtype)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks == 1:
            return self._send(version, tensors, reference)
        walk = iter(tensors)
        report: SyncReport | None = None
        failure: Exception | None = None
        try:
            if dist.get_rank() == 0:
                report = self._send(version, walk, reference)
            collections.deque(walk, maxlen=0)
        except Exception as error:  # noqa: BLE001  it is raised below, when the other ranks do not wait any more
            failure = error
            with contextlib.suppress(type(error)):
                collections.deque(walk, maxlen=0)
        # Told as text: not every error can be made anew by another process.
        outcome: list[Any] = [report, isinstance(failure, EngineLostError), f"{type(failure).__name__}: {failure}"]
        dist.broadcast_object_list(outcome, src=0)
        if failure is not None:
            raise failure
        report, lost, why = outcome
        if report is None:
            raise (EngineLostError if lost else RuntimeError)(f"rank 0 could not send the weights: {why}")
        return report

    @contextlib.contextmanager
    def _losing(self, verb: str) -> Iterator[None]:
        """Tell what waiting and sending the weights again can repair from what it cannot."""
        try:
            yield
        except (ConnectionError, TimeoutError) as error:
            raise EngineLostError(f"{verb}: {error}") from error
        except ServerError as error:
            if error.status not in (409, 423, 502, 503, 504):
                raise
            raise EngineLostError(f"{verb}: {error}") from error
