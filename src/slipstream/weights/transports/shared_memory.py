"""Weights through a file in shared memory that the server made: the trainer writes, every worker maps and reads.

The file begins with a nonce, by which a writer knows that it has opened the server's file and not one of the same name
on another machine. Pages are made when the file is first mapped, which costs more than writing to them: a writer keeps
its mapping for the next update.
"""

from __future__ import annotations

import hmac
import mmap
import os
from collections.abc import Iterable, Sequence
from types import TracebackType

import torch
from torch import Tensor

from slipstream.serving.wire import TensorSpec
from slipstream.weights.buckets import matched, views
from slipstream.weights.layout import ALIGNMENT, layout
from slipstream.weights.verify import checksum


class NotSharedError(RuntimeError):
    """The file is not the server's: writer and server do not share a machine, or not a user."""


class Writer:
    """The trainer's side of one update.

    Args:
        path: The server's file.
        nonce: What its first bytes must be.
        offset: Where the tensors' layout begins.
        specs: What will be written.
        mapped: The mapping of an earlier writer; used if it is of the same file and large enough.

    Attributes:
        mapped: The file's mapping, for the next writer.

    Raises:
        NotSharedError: the file is not there, not this user's, or has another nonce.
        OSError: shared memory is full.
    """

    def __init__(
        self, path: str, nonce: bytes, offset: int, specs: Sequence[TensorSpec], mapped: Mapping | None = None
    ) -> None:
        end = offset + layout(specs)[1]
        self._specs = specs
        self.mapped = mapped if mapped and mapped.serves(path, end) else Mapping(path, end)
        if not nonce or not hmac.compare_digest(bytes(self.mapped.memory[: len(nonce)].tolist()), nonce):
            raise NotSharedError(f"{path} is not the server's file: its first bytes are not the server's nonce")
        self._views: list[tuple[str, Tensor]] | None = views(self.mapped.memory[offset:], specs)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._views = None

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> list[int]:
        """Write `tensors`, cast to the types of the specs. Returns a checksum each.

        Raises:
            ValueError: they are not those of the specs, in their order.
        """
        if self._views is None:
            raise RuntimeError("write: this writer was left")
        sums = []
        for (_, tensor), (_, view) in zip(matched(self._specs, tensors), self._views, strict=True):
            view.copy_(tensor)
            sums.append(checksum(view))
        return torch.stack(sums).tolist() if sums else []


class Mapping:
    """A file, mapped with all its pages, as a uint8 vector: `memory`. It is unmapped when nothing refers to it."""

    def __init__(self, path: str, end: int) -> None:
        """Map it. Raises as `Writer` does; `end`: bytes that it must have."""
        try:
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
            raise NotSharedError(f"{path} cannot be opened here ({error.strerror})") from error
        try:
            status = os.fstat(file)
            if status.st_size < end:
                raise NotSharedError(f"{path} has {status.st_size} bytes; the weights need {end}")
            try:
                # A page that cannot be made later would end this process with a bus error instead.
                os.posix_fallocate(file, 0, status.st_size)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"{os.path.dirname(path)} has no room for {status.st_size / 1e9:.2f} GB of weights "
                    f"({error.strerror}): enlarge it (docker: --shm-size)",
                ) from error
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            shared = mmap.mmap(file, status.st_size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(file)
        self.memory: Tensor = torch.frombuffer(shared, dtype=torch.uint8)
        self._file = path, status.st_dev, status.st_ino

    def serves(self, path: str, end: int) -> bool:
        """Whether it is of the file that now is at `path`, and has `end` bytes."""
        if not os.path.exists(path):
            return False
        status = os.stat(path, follow_symlinks=False)
        return self._file == (path, status.st_dev, status.st_ino) and len(self.memory) >= end


def read(path: str, offset: int, specs: Sequence[TensorSpec]) -> list[tuple[str, Tensor]]:
    """The tensors in a file, as they lie there. They keep it mapped; nothing that is done to them changes the file.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is too short, or `offset` is not aligned.
    """
    end = offset + layout(specs)[1]
    if offset % ALIGNMENT:
        raise ValueError(f"offset={offset} is not allowed: it must be a multiple of {ALIGNMENT}")
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size = os.fstat(file).st_size
        if size < end:
            raise ValueError(f"{path} has {size} bytes; its tensors need {end}")
        # A private mapping reads the file's pages until one is written to: a model whose loading changes a tensor in
        # place changes a copy, and the other workers' weights stay what the trainer sent.
        memory = mmap.mmap(file, size, access=mmap.ACCESS_COPY)
    finally:
        os.close(file)
    return views(torch.frombuffer(memory, dtype=torch.uint8)[offset:], specs)
