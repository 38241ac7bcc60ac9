"""What one replica does of a call to generate: its parts, which others can take over, and its relabelled answer."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import HTTPException

from slipstream.serving import wire
from slipstream.serving.asking import ReplicaLost, check_files, detail_of
from slipstream.serving.replica_process import Replica


@dataclass
class Part:
    """Completions `first` to `first + n - 1` of the caller's prompt `index`, as a prompt of their own."""

    index: int
    first: int
    prompt: wire.PromptMessage
    left: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.left = set(range(self.prompt.n))

    def rest(self) -> list[Part]:
        """What has not come, as parts with the same seeds."""
        parts: list[Part] = []
        for sample in sorted(self.left):
            last = parts[-1] if parts else None
            if last is not None and last.first + last.prompt.n == self.first + sample:
                last.prompt.n += 1
                last.left.add(last.prompt.n - 1)
                continue
            seed = None if self.prompt.seed is None else self.prompt.seed + sample
            prompt = msgspec.structs.replace(self.prompt, n=1, seed=seed)
            parts.append(Part(self.index, self.first + sample, prompt))
        return parts


class Share:
    """What one replica does of a call, and its answer, relabelled with the caller's indexes.

    Attributes:
        incarnation: The replica's, when it was asked.
        ended: Whether its answer came whole.
    """

    def __init__(self, replica: Replica, parts: list[Part]) -> None:
        self.replica = replica
        self.parts = parts
        self.ended = False
        self.response: Any = None
        self._rest = b""
        self._error: Exception | None = None
        self.incarnation = replica.incarnation
        self._count(sum(len(part.left) for part in parts))

    def _count(self, change: int) -> None:
        if self.replica.incarnation == self.incarnation:
            self.replica.running += change

    def close(self) -> None:
        """Drop the connection: the replica stops what is unfinished."""
        if self.response is not None:
            self.response.close()
        self._count(-sum(len(part.left) for part in self.parts))

    async def open(self, message: wire.GenerateMessage) -> None:
        """Send the request and wait until the replica has taken it.

        Raises:
            HTTPException: the replica refuses.
            ReplicaLost: it has died.
            NoFilesLeft: it was not asked.
        """
        check_files(self.replica)
        body = msgspec.structs.replace(message, prompts=[part.prompt for part in self.parts])
        async with self.replica.lost_as_error("POST /generate"):
            self.response = await self.replica.open("POST", "/generate", body)
            if self.response.status != 200:
                detail = detail_of(await self.response.read())
                raise HTTPException(self.response.status, re.sub(r"^prompt (\d+)", self._renamed, detail))

    def _renamed(self, match: re.Match[str]) -> str:
        index = int(match[1])
        return f"prompt {self.parts[index].index}" if index < len(self.parts) else match[0]

    async def pieces(self, rendered: set[int]) -> AsyncIterator[tuple[bytes, int]]:
        """The answer as it comes: frames, and how many. Prompt frames come for prompts not in `rendered` only.

        Raises:
            ReplicaLost: the replica has died.
            StreamError: it could not go on.
        """
        async with self.replica.lost_as_error("all of POST /generate"):
            async for data in self.response.content.iter_any():
                piece, frames = self._relabel(data, rendered)
                if frames:
                    yield piece, frames
                if self._error is not None:
                    raise self._error
        if not self.ended:
            raise ReplicaLost(f"{self.replica.name} ended its answer too early")

    def _relabel(self, data: bytes, rendered: set[int]) -> tuple[bytes, int]:
        """The whole frames of `data`: headers get the caller's indexes, arrays are not looked at."""
        buffer = bytearray(self._rest + data if self._rest else data)
        view, kept = memoryview(buffer), []
        at, size, done = 0, len(buffer), 0
        while size - at >= wire.HEADER.size:
            kind, finish, flags, runs, prompt, sample, tokens = wire.HEADER.unpack_from(buffer, at)
            body = at + wire.HEADER.size
            end = body + wire.body_length(kind, finish, bool(flags & wire.HAS_LOGPROBS), runs, tokens)
            if end > size:
                break
            if kind == wire.ERROR:
                text = buffer[body:end].decode(errors="replace")
                # Raised once the frames before it are passed on: nobody asks for their completions again.
                self._error = ReplicaLost(text) if prompt == 503 else wire.StreamError(prompt, text)
                break
            if kind == wire.END:
                self.ended = True
            else:
                part = self.parts[prompt]
                if kind == wire.COMPLETION:
                    part.left.remove(sample)
                    done += 1
                    sample += part.first
                if kind == wire.COMPLETION or part.index not in rendered:
                    wire.HEADER.pack_into(buffer, at, kind, finish, flags, runs, part.index, sample, tokens)
                    kept.append(view[at:end])
                    if kind == wire.PROMPT:
                        rendered.add(part.index)
            at = end
        self._count(-done)
        self._rest = bytes(view[at:])
        return b"".join(kept), len(kept)
