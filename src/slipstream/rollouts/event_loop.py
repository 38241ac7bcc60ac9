"""One event loop for all that a run awaits, in a thread of its own."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class EventLoop:
    """Runs coroutines from code that is none, always in the same loop.

    One for all calls: a client or a lock that a user's function keeps belongs to the loop it was first used in. In a
    thread: the caller may already have a loop running (a notebook has).

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """What the coroutine returns. If it fails, or the caller is interrupted, all that is under way is cancelled."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            weakref.finalize(self, self._loop.close)
        loop, task = self._loop, self._loop.create_task(coroutine)
        with ThreadPoolExecutor(1, thread_name_prefix=self._name) as pool:
            future = pool.submit(loop.run_until_complete, task)
            try:
                return future.result()
            except BaseException:
                if not future.done():  # leaving the pool would wait for it
                    loop.call_soon_threadsafe(task.cancel)
                # Or it would go on with the next call.
                pool.submit(_cancel_all, loop).result()
                raise


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left))
