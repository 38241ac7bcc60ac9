"""An engine samples from one mixture of policy and reference at a time: calls of different mixtures take turns."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

from slipstream.generation.requests import mixture_of
from slipstream.serving import wire


class Turns:
    """Lets calls in: those of the present mixture at once, unless another waits; then all in the order they came.

    Args:
        change: Makes the engine sample from a mixture. Called while no call is in.
        mixture: What it samples from now; None: unknown.
    """

    def __init__(self, change: Callable[[float], Awaitable[None]], mixture: float | None) -> None:
        self._change = change
        self._mixture = mixture
        self._door = asyncio.Lock()  # lets waiting tasks in one by one, first come first served
        self._calls = 0
        self._empty = asyncio.Event()
        self._empty.set()

    async def enter(self, mixture: float) -> ExitStack:
        """Wait for a turn. Closing what it returns ends it; closing twice is closing once."""
        async with self._door:
            if mixture != self._mixture:
                await self._empty.wait()
                self._mixture = None  # if the change fails or is cancelled, nobody knows
                await self._change(mixture)
                self._mixture = mixture
            self._calls += 1
            self._empty.clear()
        turn = ExitStack()
        turn.callback(self._leave)
        return turn

    def _leave(self) -> None:
        self._calls -= 1
        if not self._calls:
            self._empty.set()


def mixture_of_call(message: wire.GenerateMessage, has_reference: bool) -> float:
    """The mixture that all prompts of a call ask for.

    Raises:
        ValueError: they differ, are not in [0, 1], or need a reference where there is none.
    """
    mixture = mixture_of(message.prompts, has_reference=True)
    if mixture > 0 and not has_reference:
        raise ValueError(
            f"mixture={mixture!r} samples from a reference, and this server has no reference model: start it with "
            "--reference, or set mixture=0"
        )
    return mixture
