"""Weights through a process group of their own: the trainer is rank 0 and broadcasts packed buckets to all workers.

The group is made directly, so that the trainer's default group is left alone, and its members find each other through
the server (`HttpStore`): nothing listens that does not ask for the server's key, except the group's own connections.
They are made on the one interface by which the server is reached, or on that which NCCL_SOCKET_IFNAME names for NCCL.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from slipstream.environment import variable
from slipstream.serving.wire import TensorSpec
from slipstream.weights.buckets import Inspection, Packer, bucket_checksum, views
from slipstream.weights.layout import layout
from slipstream.weights.transports.http_store import HttpStore
from slipstream.weights.transports.interfaces import nccl_on

__all__ = ["Group", "GroupError", "HttpStore", "join", "leave", "receive", "send"]

# Both sides must cut alike. NCCL is fastest on large pieces; on a CPU smaller ones overlap packing and sending.
BUCKET_BYTES = {"nccl": 256 << 20, "gloo": 32 << 20}
_SPARE_BYTES = 1 << 30  # of device memory that are left free beside a worker's staging buffer


class GroupError(RuntimeError):
    """The process group cannot be joined, or a member did not do its part in time. It has to be left and made anew."""


@dataclass(slots=True)
class Group:
    """A process group that this process is a member of.

    Attributes:
        device: That the tensors it moves are on.
        timeout: Seconds that a step of an exchange may take.
    """

    backend: str
    rank: int
    size: int
    device: torch.device
    timeout: float
    process_group: Any
    store: HttpStore
    stream: Any = None

    @property
    def bucket_bytes(self) -> int:
        """Size of the buckets that tensors travel in; the last one may be smaller."""
        return BUCKET_BYTES[self.backend]


def join(
    backend: str, store: HttpStore, rank: int, world_size: int, timeout: float, device: torch.device | str
) -> Group:
    """Become rank `rank` of a new group. All its members must call this within the store's timeout.

    Args:
        backend: "nccl" or "gloo".
        store: Through which the members find each other.
        timeout: Seconds that a step of an exchange may take.
        device: An accelerator for nccl, the CPU for gloo.

    Raises:
        GroupError: a member did not come, or could not be connected to; the message says which.
    """
    device = torch.device(device)
    if (backend, device.type) not in (("nccl", "cuda"), ("gloo", "cpu")):
        raise ValueError(f"backend={backend!r} cannot move tensors on {device}; use nccl on cuda and gloo on cpu")
    try:
        address = _meet(store, rank, world_size)
        with nccl_on(address) if backend == "nccl" else contextlib.nullcontext():
            process_group = _MAKERS[backend](store, rank, world_size, timeout, address, device)
            group = Group(backend, rank, world_size, device, timeout, process_group, store)
            if backend == "nccl":
                group.stream = torch.cuda.Stream(device)
            # Connects what connects late, as NCCL does, and shows that all members can hear rank 0.
            process_group.broadcast(torch.zeros(1, dtype=torch.uint8, device=device), 0).wait()
    except (RuntimeError, ConnectionError, TimeoutError) as error:
        raise GroupError(f"rank {rank} of {world_size} could not join the {backend} group: {error}") from error
    return group


def send(
    group: Group,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    progress: Callable[[], None] = lambda: None,
) -> list[int]:
    """Broadcast `tensors` from rank 0, cast to the types of `specs`. Returns a checksum of each bucket.

    Args:
        progress: Called for each bucket that is on its way, and now and then while the last ones are waited for.

    Raises:
        GroupError: a worker did not take its part within the group's timeout.
        ValueError: the tensors are not those of the specs; the group has to be left.
    """
    size = group.bucket_bytes
    total = layout(specs)[1]
    memory = [torch.empty(min(size, total), dtype=torch.uint8, device=group.device) for _ in range(2)]
    works: list[Any] = []
    sums: list[Tensor] = []
    waiting = _Waiting(group, "the server's workers")

    def take(index: int) -> Tensor:
        if index >= 2:  # one bucket is filled while the other travels
            with waiting:
                _hold(group, works[index - 2])
        return memory[index % 2]

    # Sums of buckets: of each tensor, they would cost more of Python's time than the tensors take to travel.
    for bucket in Packer(specs, tensors, size, take, sums=False):
        sums.append(bucket_checksum(bucket))
        with waiting:
            works.append(group.process_group.broadcast(bucket, 0))
        progress()
    for work in works:  # NCCL's may all be still to come: what holds them is the device's stream
        with waiting:
            work.wait()
        progress()
    return torch.stack(sums).tolist() if sums else []


@dataclass(frozen=True, slots=True)
class Received:
    """What came.

    Attributes:
        tensors: By name; views of one buffer.
        checksums: Of the buckets.
        finite: Whether all values are known to be finite. False says nothing.
    """

    tensors: list[tuple[str, Tensor]]
    checksums: list[int]
    finite: bool


def receive(group: Group, specs: Sequence[TensorSpec], device: torch.device | str) -> Received:
    """Take the tensors that rank 0 sends, into one buffer that they are views of. Runs beside generation, in a thread.

    Args:
        device: Where to keep them: the group's. If an accelerator's free memory does not hold them, they are kept in
            page-locked host memory.

    Raises:
        GroupError: the trainer did not send within the group's timeout, or is gone.
    """
    size = group.bucket_bytes
    with _on_stream(group), _Waiting(group, "the trainer"):
        staging = _staging(group, layout(specs)[1], torch.device(device))
        parts = staging.split(size) if len(staging) else ()
        arrived = Inspection(specs)
        if staging.device.type == group.device.type:
            works = [group.process_group.broadcast(part, 0) for part in parts]
            for work, part in zip(works, parts, strict=True):
                work.wait()
                arrived.look_at(part)  # while the next ones travel
        else:
            memory = [torch.empty(min(size, len(staging)), dtype=torch.uint8, device=group.device) for _ in range(2)]
            for index, part in enumerate(parts):
                bucket = memory[index % 2][: len(part)]
                group.process_group.broadcast(bucket, 0).wait()
                arrived.look_at(bucket)
                part.copy_(bucket, non_blocking=True)  # the next broadcast into this bucket waits for it on the stream
            group.stream.synchronize()
        return Received(views(staging, specs), *arrived.found())


def leave(group: Group) -> None:
    """Leave the group at once: members that wait for this one are told by their connections, or by their deadline."""
    if group.process_group is not None:
        if group.backend == "nccl":
            group.process_group.abort()
        else:
            _disconnect(group)
        group.process_group = None
    group.store.close()


def _disconnect(group: Group) -> None:
    """Close the connections of a gloo group, and fail what waits for them, in this process and in the others.

    Its `abort` does nothing, and its destructor waits for all that is pending, until the group's timeout. But a receive
    that runs out of time closes all connections of its group. What it asks for is never sent: no member uses `send`.
    """
    for rank in range(group.size):
        if rank != group.rank:
            with contextlib.suppress(RuntimeError):  # it ran out of time, or this connection was closed already
                work = group.process_group.recv([torch.empty(1, dtype=torch.uint8)], rank, 0)
                work.wait(timedelta(milliseconds=1))


def _meet(store: HttpStore, rank: int, world_size: int) -> str:
    """Wait until all members are at the store. Returns the address by which this one can be reached by the others."""
    members = [f"member/{r}" for r in range(world_size)]
    try:
        # The trainer comes to the server, and the workers answer on the interface that leads to the trainer.
        trainer = str(urlsplit(store.url).hostname) if rank == 0 else store.get(members[0]).decode()
        address = _own_address_towards(trainer)
        store.set(members[rank], address)
        store.wait(members)
    except TimeoutError as error:
        absent = [members.index(key) for key in store.missing(members)]
        names = ", ".join("the trainer (rank 0)" if r == 0 else f"worker {r - 1} (rank {r})" for r in absent)
        raise TimeoutError(f"waited {store.seconds:g} s for {names or 'members that came too late'}") from error
    return address


def _own_address_towards(host: str) -> str:
    """This machine's address on the interface that leads to `host`. Nothing is sent."""
    family, kind, protocol, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def _make_gloo(store: HttpStore, rank: int, world_size: int, timeout: float, address: str, device: torch.device) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=timeout)
    options._threads = 2  # buckets travel one after the other; the second thread has the next one ready
    return dist.ProcessGroupGloo(store, rank, world_size, options)


def _make_nccl(store: HttpStore, rank: int, world_size: int, timeout: float, address: str, device: torch.device) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout)
    torch.cuda.set_device(device)
    # With it `wait` has the group's timeout and raises. Without it a watchdog ends the whole process when a member is
    # gone. It is read when a group is made; the trainer's other groups are not to have it.
    with variable("TORCH_NCCL_BLOCKING_WAIT", "1"):
        return dist.ProcessGroupNCCL(store, rank, world_size, options)


_MAKERS = {"gloo": _make_gloo, "nccl": _make_nccl}


def _hold(group: Group, work: Any) -> None:
    """Keep what follows from writing into a bucket that still travels: this thread, or only the device's stream."""
    if group.backend == "nccl":
        work.synchronize()
    else:
        work.wait()


def _staging(group: Group, total: int, device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < total + _SPARE_BYTES:
        device = torch.device("cpu")
    # An accelerator copies into page-locked memory without holding anything up.
    return torch.empty(total, dtype=torch.uint8, device=device, pin_memory=device.type != group.device.type)


@contextlib.contextmanager
def _on_stream(group: Group) -> Iterator[None]:
    """Use the group's own stream, so that generation does not wait for the trainer."""
    if group.stream is None:
        yield
        return
    with torch.cuda.device(group.device), torch.cuda.stream(group.stream):
        yield


@dataclass(frozen=True)
class _Waiting:
    """Around what waits for others: an error says for whom."""

    group: Group
    others: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, RuntimeError):
            return
        reason = str(error).partition(" This is typically")[0]  # gloo guesses at causes
        raise GroupError(
            f"rank {self.group.rank} of {self.group.size} waited for {self.others}, who did not do their part within "
            f"{self.group.timeout:g} s or are gone: {reason}"
        ) from error
