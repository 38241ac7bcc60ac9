"""What can become of a question to replicas, to one or to several at the same time."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

import msgspec
from fastapi import HTTPException

if TYPE_CHECKING:
    from slipstream.serving.replica_process import Replica

M = TypeVar("M", bound=msgspec.Struct)
FILES_FOR_CLIENTS = 64  # that requests leave for connections of those who must be told that there are no more
OTHERS = (
    "other weights of version {version} serve than those that are asked for: the server was started again, or another "
    "trainer sends it its own"
)


class ReplicaRefused(Exception):
    """A replica answered with an error. `status` is its HTTP status."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class ReplicaLost(Exception):
    """A replica did not answer: it has died, or was silent until the deadline."""


class NoFilesLeft(Exception):
    """A replica was not asked, or not started, as this process may open no more files. That says nothing of it."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the server has too many files open to {what}: a request takes two. Send fewer at a time, or start the "
            "server with a higher limit (ulimit -n)"
        )


def check_files(replica: Replica) -> None:
    """Raise NoFilesLeft if a request to the replica would take one of the last files.

    They are for clients: where the last one is taken, connections that come are broken off without an answer.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        lowest = os.open(os.devnull, os.O_RDONLY)  # of all numbers that are free, as POSIX has it
    except OSError as error:
        if out_of_files(error):
            raise no_files(replica) from error
        raise
    os.close(lowest)
    if limit != resource.RLIM_INFINITY and lowest >= limit - FILES_FOR_CLIENTS:
        raise no_files(replica)


def no_files(replica: Replica) -> NoFilesLeft:
    """The replica was not asked."""
    return NoFilesLeft(f"ask {replica.name}")


def refusal(error: NoFilesLeft) -> HTTPException:
    """What a client is told. Its connection ends with it, for others need the file."""
    return HTTPException(503, str(error), {"connection": "close"})


def out_of_files(error: BaseException) -> bool:
    """Whether an error is that this process, or this machine, may open no more files."""
    return getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)


def detail_of(body: bytes) -> str:
    """The reason in an answer of ours that is an error, whichever form it has."""
    for reader in (msgspec.json, msgspec.msgpack):
        try:
            return str(reader.decode(body)["detail"])
        except (msgspec.DecodeError, KeyError, TypeError):  # the other form, or not ours
            continue
    return body[:500].decode(errors="replace")


async def ask_all(
    replicas: Iterable[Replica], path: str, message: msgspec.Struct | None, timeout: float, kind: type[M] | None = None,
    method: str = "POST",
) -> tuple[dict[Replica, M], dict[Replica, Exception]]:  # fmt: skip
    """Send the same to several replicas at the same time; returns the answers, and the errors of the others.

    A replica that does not answer in time is killed, and then started again: nobody knows what it has done.
    """
    asked = list(replicas)
    calls = (replica.call(method, path, message, kind, timeout) for replica in asked)
    answers: dict[Replica, M] = {}
    failed: dict[Replica, Exception] = {}
    for replica, answer in zip(asked, await asyncio.gather(*calls, return_exceptions=True), strict=True):
        if isinstance(answer, ReplicaLost | ReplicaRefused | NoFilesLeft):
            failed[replica] = answer
            if isinstance(answer, ReplicaLost):
                replica.kill()
        elif isinstance(answer, BaseException):
            raise answer
        else:
            answers[replica] = answer
    return answers, failed


def worst(failed: dict[Replica, Exception]) -> HTTPException:
    """One error to tell a client for those of several replicas: a refusal, or that one was lost or not asked."""
    for error in failed.values():
        if isinstance(error, ReplicaRefused):
            return HTTPException(error.status, str(error))
    return HTTPException(503, str(next(iter(failed.values()))))
