"""Worker processes for math-verify, each request with a deadline that holds on any thread.

math-verify's own time limit is a signal, which only the main thread may use, and which a long C function ignores.
Here the comparison runs in a child process (`math_worker.py`); one that is too slow is ended and replaced.
The children are started with `subprocess`: a fork would copy live torch threads and CUDA, and `multiprocessing`'s
spawn would run the user's script a second time.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
GRACE_SECONDS = 60.0  # The worker counts its seconds on a core; this is for one that gets none.
ITEMS_PER_WORKER = 48  # Starting one more worker costs about as much as comparing several hundred short answers.


class Dead(Exception):
    """The worker ended, or was ended, before it answered."""


class Worker:
    """One child process. Not thread-safe; the pool gives it to one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def ask(self, seconds: float, *question: str) -> Any:
        """The worker's answer to `question`.

        Raises:
            Dead: It took more than `seconds` seconds or died; the next call starts a new process.
            RuntimeError: The process cannot be started.
        """
        process = self._process if self._process and self._process.poll() is None else self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([seconds, *question]).encode() + b"\n")
            process.stdin.flush()
            return self._read(seconds + GRACE_SECONDS)
        except (BrokenPipeError, Dead) as error:
            self.close()
            raise Dead from error
        except BaseException:  # Ctrl-C: the answer that is still to come belongs to no later question.
            self.close()
            raise

    def close(self) -> None:
        """End the process and wait for its end."""
        process, self._process, self._buffer = self._process, None, b""
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # Closing flushes what the dead process did not read.

    def _start(self) -> subprocess.Popen[bytes]:
        self.close()
        # The child sees the packages this process sees, also those found through changes to sys.path.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        script = Path(__file__).with_name("math_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        try:
            self._read(START_SECONDS)
        except Dead as error:
            self.close()
            raise RuntimeError(
                f"the process that compares mathematics did not start within {START_SECONDS:.0f} s; "
                f"try `{sys.executable} -c 'import math_verify'` to see why"
            ) from error
        return self._process

    def _read(self, seconds: float) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        poller = select.poll()  # Not select(): a trainer may hold more than 1024 descriptors.
        poller.register(descriptor, select.POLLIN)
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not poller.poll(left * 1000):
                raise Dead(f"no answer within {seconds} s")
            piece = os.read(descriptor, 65536)
            if not piece:
                raise Dead("end of output")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)


class MathPool:
    """Compares completions with gold answers in up to `workers` child processes, started when first needed."""

    def __init__(self, workers: int | None = None) -> None:
        self._count = workers or max(1, min(4, len(os.sched_getaffinity(0)) // 2))
        self._golds: dict[str, bool] = {}
        self.forget()

    def forget(self) -> None:
        """Start afresh without touching the workers: after a fork, their pipes and the lock are the parent's."""
        self._workers: list[Worker] = []
        self._lock = threading.Lock()

    def gold_parses(self, golds: Sequence[str], seconds: float) -> dict[str, bool]:
        """Whether each gold answer can be parsed; one that takes longer than `seconds` cannot."""
        with self._lock:
            unknown = [gold for gold in dict.fromkeys(golds) if gold not in self._golds]
            for gold, answer in zip(unknown, self._ask_all([(gold,) for gold in unknown], seconds), strict=True):
                self._golds[gold] = bool(answer)
            return {gold: self._golds[gold] for gold in golds}

    def compare(self, pairs: Sequence[tuple[str, str]], seconds: float) -> list[tuple[bool, str | None] | None]:
        """For each (gold, text): whether the text's answer equals gold, and the answer as it was found in the text.

        None where the comparison took longer than `seconds` seconds (or its process died); a warning is logged.
        """
        with self._lock:
            return self._ask_all(pairs, seconds)

    def close(self) -> None:
        """End the worker processes; a later call starts new ones."""
        with self._lock:
            for worker in self._workers:
                worker.close()
            self._workers.clear()

    def _ask_all(self, questions: Sequence[tuple[str, ...]], seconds: float) -> list[Any]:
        if not questions:
            return []
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("comparing mathematics needs the package math-verify: pip install math-verify")
        wanted = min(self._count, 1 + len(questions) // ITEMS_PER_WORKER)
        self._workers += [Worker() for _ in range(wanted - len(self._workers))]
        if wanted == 1:
            return [_ask(self._workers[0], seconds, question) for question in questions]
        answers: list[Any] = [None] * len(questions)
        todo = iter(list(enumerate(questions)))
        take = threading.Lock()

        def work(worker: Worker) -> None:  # Texts differ in length, so a worker takes the next when it is free.
            while True:
                with take:
                    index, question = next(todo, (-1, ()))
                if index < 0:
                    return
                answers[index] = _ask(worker, seconds, question)

        with ThreadPoolExecutor(wanted, thread_name_prefix="math-verify") as threads:
            for future in [threads.submit(work, worker) for worker in self._workers[:wanted]]:
                future.result()
        return answers


def _ask(worker: Worker, seconds: float, question: tuple[str, ...]) -> Any:
    try:
        return worker.ask(seconds, *question)
    except Dead:
        logger.warning("no verdict within %.3g s for %r", seconds, tuple(part[-200:] for part in question))
        return None


POOL = MathPool()
"""The process's own pool."""

atexit.register(POOL.close)
os.register_at_fork(after_in_child=POOL.forget)
