"""A file in shared memory that weights arrive in: readable by its user alone, and gone when the server is."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import stat

from fastapi import HTTPException

from slipstream.serving import machine

FOLDER = machine.SHARED_MEMORY
NONCE_BYTES = 32
OFFSET = 64  # of the first tensor: behind the nonce, aligned as all tensors are
_PREFIX = "slipstream-weights-"


class SharedFile:
    """A file for weights of `size` bytes after a nonce, by which a client knows that it has opened the right one.

    It is locked while its server runs, so that others can tell one that was left behind. `allocate` gives it memory.

    Raises:
        OSError: there is no shared memory here.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.nonce = b""
        self.path = FOLDER / f"{_PREFIX}{secrets.token_hex(16)}"
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)  # a starting server may hold it, to look whether it is in use

    def allocate(self) -> None:
        """Take all memory now: a client that writes into memory that is not there is killed by a signal.

        Raises:
            OSError: there is not so much.
        """
        os.posix_fallocate(self._descriptor, 0, OFFSET + self.size)

    def renew(self) -> None:
        """Write a new nonce, for the next transaction."""
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        os.pwrite(self._descriptor, self.nonce, 0)

    def write(self, offset: int, data: bytes) -> None:
        """Put `data` at `offset`, counted from the first tensor's first byte.

        Raises:
            ValueError: it reaches beyond the end.
        """
        if offset < 0 or offset + len(data) > self.size:
            raise ValueError(f"bytes {offset} to {offset + len(data)} are outside of the {self.size} bytes announced")
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, OFFSET + offset)
            view, offset = view[written:], offset + written

    def close(self) -> None:
        """Remove the file. Processes that have mapped it keep what they have. Closing twice does nothing."""
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


class SharedFiles:
    """At most one file each for the policy's weights and for the reference model's (False, True).

    Clients keep a file mapped, which is most of the work, so that it is used again as long as its size is right.
    """

    def __init__(self) -> None:
        self._files: dict[bool, SharedFile] = {}

    def choose(self, reference: bool, size: int) -> SharedFile:
        """The file of the last update, or a new one without memory.

        Raises:
            HTTPException: 507, there is no shared memory on the server's machine.
        """
        file = self._files.get(reference)
        if file is not None and file.size == size:
            return file
        try:
            return SharedFile(size)
        except OSError as error:
            raise HTTPException(
                507, f"weights that do not come through a process group need {FOLDER} on the server's machine: {error}"
            ) from error

    async def use(self, reference: bool, file: SharedFile) -> None:
        """Take a chosen file for the next update; it gets its memory, and another's is freed.

        Raises:
            HTTPException: 507, there is not so much.
        """
        last = self._files.get(reference)
        if last is not file:
            if last is not None:
                last.close()
            self._files[reference] = file
            try:
                await asyncio.to_thread(file.allocate)
            except (OSError, OverflowError) as error:
                del self._files[reference]
                raise HTTPException(507, f"{FOLDER} has no room for {file.size} bytes of weights: {error}") from error
        file.renew()

    def release(self, reference: bool, file: SharedFile) -> None:
        """Remove a chosen file that has not come into use."""
        if self._files.get(reference) is not file:
            file.close()

    def leave_behind(self, reference: bool, file: SharedFile) -> None:
        """Remove a file that somebody may still write to: the next update gets another."""
        if self._files.get(reference) is file:
            del self._files[reference]
        file.close()

    def close(self) -> None:
        """Remove all files."""
        for file in self._files.values():
            file.close()
        self._files = {}


def remove_abandoned() -> int:
    """Remove this user's files of servers that were killed; how many there were."""
    removed = 0
    for path in FOLDER.glob(f"{_PREFIX}*"):
        try:
            status = path.lstat()  # anybody may put a link there, to what is this user's
            if status.st_uid != os.getuid() or not stat.S_ISREG(status.st_mode):
                continue
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # its server has just ended
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Without a size it may be a server's that has not locked it yet.
            if os.fstat(descriptor).st_size:
                path.unlink(missing_ok=True)
                removed += 1
        except BlockingIOError:
            pass  # its server runs
        finally:
            os.close(descriptor)
    return removed
