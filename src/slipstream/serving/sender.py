"""The trainer's side of weight updates: which way the weights go, and what is done when one is interrupted."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn

import msgspec
import torch
from torch import Tensor

from slipstream.checks import one_of
from slipstream.generation.engine import SyncReport
from slipstream.serving import machine, wire
from slipstream.serving.connection import Connection, RefusedError, ServerError
from slipstream.serving.joining import ask_in_turn, make_group, patience
from slipstream.serving.life_signs import SIGN_SECONDS, LifeSigns
from slipstream.serving.wire import TensorSpec
from slipstream.weights.buckets import Packer, specs_of
from slipstream.weights.layout import ITEM_BYTES, bytes_of, unsendable
from slipstream.weights.plan import WeightUpdateError
from slipstream.weights.transports import group
from slipstream.weights.transports.shared_memory import Mapping, NotSharedError, Writer

BODY_BYTES = 32 << 20  # of one HTTP request
STEP_SECONDS = 300.0  # that a step of an exchange between members of a group, or one HTTP body, may take
CONFLICT = 409  # status: the process group is not of all replicas

logger = logging.getLogger(__name__)
Tensors = Iterable[tuple[str, Tensor]]


class Sender:
    """Sends weights to one server, one update at a time.

    Args:
        connection: To the server.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._device: torch.device | None = None
        self._transport = ""
        self._patience = STEP_SECONDS  # for the server's answers; it says how long it may take
        self._sign = SIGN_SECONDS
        self._chosen = False  # whether the transport was asked for, so that no other may take its place
        self._dtype = ""
        self._group: group.Group | None = None
        self._mapped: dict[str, Mapping] = {}
        self._lock = threading.Lock()

    def connect(self, device: int | str | torch.device, transport: str | None) -> None:
        """Decide how weights travel, and make the process group if they travel through one.

        Args:
            device: That the trainer computes on; a number is an accelerator's, where there is one.
            transport: One of `wire.TRANSPORTS`. None: a process group between accelerators and to workers on several
                machines; else shared memory, and HTTP where trainer and server do not share a machine.

        Raises:
            ConnectionError: the server was lost, or its workers did not join the process group.
            ValueError: the transport cannot work, or trainer and server share an accelerator.
        """
        if transport is not None:
            one_of("transport", transport, wire.TRANSPORTS)
        if isinstance(device, int):
            device = f"cuda:{device}" if torch.cuda.is_available() else "cpu"
        with self._lock:
            self._disconnect()
            info = self._connection.get("/server_info", wire.ServerInfo)
            self._device, self._dtype, self._patience = torch.device(device), info.dtype, patience(info)
            self._sign = min(SIGN_SECONDS, info.update_timeout / 4)  # an update that is silent for longer is dropped
            self._chosen = transport is not None
            accelerators = self._device.type == info.platform == "cuda"
            apart = not info.shares_memory
            if apart and transport not in (None, "group"):
                raise ValueError(machine.APART.format(transport=transport))
            self._transport = transport or ("group" if accelerators or apart else "shared_memory")
            if self._transport == "group":
                self._make_group(info)

    def disconnect(self) -> None:
        """Leave the process group, and let the server leave it."""
        with self._lock:
            self._disconnect()

    def push(
        self, version: int, tensors: Tensors, specs: Sequence[TensorSpec] | None, mode: str, reference: bool
    ) -> SyncReport:
        """Send `tensors` as one update; see `VLLMClient.update_weights`."""
        begin = time.perf_counter()
        if specs is None:
            tensors = list(tensors)
        if not self._transport:
            first = tensors[0][1] if isinstance(tensors, list) and tensors else torch.empty(0)
            self.connect(first.device, None)
        with self._lock:
            if specs is None:
                specs = specs_of(list(tensors), self._dtype)
            if self._transport == "group" and self._group is None:  # left when an update failed
                self._make_group(self._connection.get("/server_info", wire.ServerInfo))
            message = wire.BeginMessage(
                version=version, tensors=list(specs), transport=self._transport, mode=mode, reference=reference
            )
            if types := unsendable(specs):
                self._refuse(message, types)
            transaction, send = self._begin(message)
            begun = time.perf_counter()
            with self._aborting(transaction, version), _refused():
                commit = wire.CommitMessage(transaction=transaction, checksums=send(tensors))
                sent = time.perf_counter()
                reply = self._connection.post("/weights/commit", commit, wire.CommitReply, timeout=self._patience)
            committed = time.perf_counter()
            logger.debug(
                "version %d: begun in %.4f s, sent in %.4f s, committed in %.4f s", version, begun - begin,
                sent - begun, committed - sent,
            )  # fmt: skip
            nbytes, seconds = sum(map(bytes_of, specs)), time.perf_counter() - begin
            return SyncReport(
                version, nbytes, len(specs), seconds, reply.paused_seconds, reply.update, reply.reference_missing
            )

    def close(self) -> None:
        """Leave the process group, and forget the server's memory. The server is not told; it may be gone."""
        self._leave()
        self._mapped.clear()

    def _refuse(self, message: wire.BeginMessage, types: str) -> NoReturn:
        """Raise WeightUpdateError for types that cannot be sent, and for what the server finds wrong beside them."""
        sendable = [
            TensorSpec(s.name, s.dtype if s.dtype in ITEM_BYTES else "float32", s.shape) for s in message.tensors
        ]
        try:
            transaction, _ = self._begin(msgspec.structs.replace(message, tensors=sendable))
        except WeightUpdateError as error:
            raise WeightUpdateError(f"{error}; {types}") from error
        state = self._give_up(transaction)
        raise WeightUpdateError(f"weight update refused, the engine is unchanged: {types}. {state}")

    def _begin(self, message: wire.BeginMessage) -> tuple[int, Callable[[Tensors], list[int]]]:
        """Open a transaction. Returns its number, and what sends its tensors and returns their checksums."""
        specs = message.tensors
        try:
            reply = self._ask_to_begin(message)
        except BaseException:
            if message.transport == "group":
                self._leave()  # as those workers have that did not refuse; the next update makes another
            raise
        alive = LifeSigns(self._connection, reply.transaction, self._sign)
        if message.transport == "group":
            return reply.transaction, lambda tensors: group.send(self._joined(), specs, alive.beside(tensors), alive)
        if message.transport == "body":
            return reply.transaction, lambda tensors: self._send_body(reply.transaction, specs, alive.beside(tensors))
        try:
            with self._aborting(reply.transaction, message.version):
                writer = self._writer(reply, specs)
            return reply.transaction, lambda tensors: writer.write(alive.beside(tensors))
        except NotSharedError as error:
            if self._chosen:
                raise WeightUpdateError(
                    f"transport='shared_memory' needs trainer and server on one machine and of one user: {error}. "
                    "Use 'body', or None to let the client choose."
                ) from error
        self._transport = message.transport = "body"
        return self._begin(message)

    def _ask_to_begin(self, message: wire.BeginMessage) -> wire.BeginReply:
        def ask() -> wire.BeginReply:
            with _refused():
                return ask_in_turn(self._connection, "/weights/begin", message, wire.BeginReply, self._patience)

        try:
            return ask()
        except ServerError as error:
            if message.transport != "group" or error.status != CONFLICT:
                raise
        self._disconnect()  # a replica ended, or came up, after the group was made
        self._make_group(self._connection.get("/server_info", wire.ServerInfo))
        return ask()

    def _writer(self, reply: wire.BeginReply, specs: Sequence[TensorSpec]) -> Writer:
        if os.path.dirname(reply.path) != str(machine.SHARED_MEMORY):
            # The nonce is no proof: whoever says it may have guessed how a file of this user begins.
            raise NotSharedError(f"{reply.path!r} is not in {machine.SHARED_MEMORY}, where a server's file would be")
        # The policy and the reference have a file each. A server that was started again has new ones.
        self._mapped = {path: mapping for path, mapping in self._mapped.items() if os.path.exists(path)}
        writer = Writer(reply.path, reply.nonce, reply.offset, specs, self._mapped.get(reply.path))
        self._mapped[reply.path] = writer.mapped
        return writer

    def _send_body(self, transaction: int, specs: Sequence[TensorSpec], tensors: Tensors) -> list[int]:
        memory = torch.empty(BODY_BYTES, dtype=torch.uint8)
        packer = Packer(specs, tensors, BODY_BYTES, lambda index: memory)
        for index, bucket in enumerate(packer):
            path = f"/weights/body?transaction={transaction}&offset={index * BODY_BYTES}"
            self._connection.call("PUT", path, content=bucket.numpy().tobytes(), timeout=STEP_SECONDS)
        return packer.totals()

    @contextlib.contextmanager
    def _aborting(self, transaction: int, version: int) -> Iterator[None]:
        """End the update if a step of it fails; the error says so, and what serves now."""
        try:
            yield
        except BaseException as error:
            what, state = f"the update to version {version} failed", self._give_up(transaction)
            if isinstance(error, ConnectionError | TimeoutError | group.GroupError):
                raise ConnectionError(f"{what}: {error}. {state}") from error
            if isinstance(error, ServerError):
                raise type(error)(error.status, f"{what}: {error}. {state}") from error
            if isinstance(error, WeightUpdateError):
                raise type(error)(f"{error}. {state}") from error
            error.add_note(f"{what}. {state}")
            raise

    def _give_up(self, transaction: int) -> str:
        """Abort an update; says what serves now."""
        try:
            if self._transport == "group":
                self._disconnect()  # nobody knows how far the others are; it ends the update, too
            else:
                self._connection.call("POST", "/weights/abort", wire.AbortMessage(transaction=transaction))
            info = self._connection.get("/server_info", wire.ServerInfo)
        except (OSError, ServerError) as error:
            return f"The server cannot be asked what it serves now ({error})"
        return f"The server serves version {info.version} now."

    def _make_group(self, info: wire.ServerInfo) -> None:
        assert self._device is not None
        self._group = make_group(self._connection, self._device, info, STEP_SECONDS)

    def _joined(self) -> group.Group:
        assert self._group is not None
        return self._group

    def _leave(self) -> None:
        joined, self._group = self._group, None
        if joined is not None:
            group.leave(joined)

    def _disconnect(self) -> None:
        if self._group is not None:
            self._leave()  # first: workers that wait for this rank are told by its connections
            self._connection.call("DELETE", "/communicator", timeout=self._patience)


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """What the server refuses is a refused update."""
    try:
        yield
    except RefusedError as error:
        raise WeightUpdateError(str(error)) from error
