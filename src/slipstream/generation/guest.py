"""Manners for an engine that lives in the trainer's process: random states, environment and torch's settings."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any


class RandomStates:
    """Global random states of Python, numpy, torch and the current CUDA device, captured now."""

    def __init__(self) -> None:
        import numpy
        import torch

        self.python, self.numpy, self.torch = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        # The CUDA generator's state lives on the host: neither call waits for the device.
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

    def restore(self) -> None:
        """Make them the current ones."""
        import numpy
        import torch

        random.setstate(self.python)
        numpy.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


class Settings:
    """Torch's number of threads, float32 precision, current device and current stream, captured now."""

    def __init__(self) -> None:
        import torch

        self.threads = torch.get_num_threads()
        self.precision = _matmul_precision()
        # This initializes CUDA: were the engine the first to do so, there would be no host state to come back to.
        self.device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.stream = torch.cuda.current_stream() if torch.cuda.is_available() else None

    def restore(self) -> None:
        """Make them the current ones."""
        import torch

        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        now = _matmul_precision()
        if now != self.precision:
            legacy, current = self.precision
            if legacy is not None:
                torch.set_float32_matmul_precision(legacy)
            else:
                torch.backends.cuda.matmul.fp32_precision = current
        if self.device is not None and torch.cuda.current_device() != self.device:
            torch.cuda.set_device(self.device)
        if self.stream is not None and torch.cuda.current_stream() != self.stream:
            # vLLM makes a stream of its own the current one. Each side's work waits for what the other has begun.
            self.stream.wait_stream(torch.cuda.current_stream())
            torch.cuda.set_stream(self.stream)


def _matmul_precision() -> tuple[str | None, str]:
    """Precision of float32 products, by torch's legacy interface (None if the new one set it) and by its new one."""
    import torch

    current = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    try:
        return torch.get_float32_matmul_precision(), current
    except RuntimeError:  # torch refuses to answer when both interfaces were used
        return None, current


def _attributes_an_engine_may_replace() -> list[tuple[Any, str]]:
    """What vLLM's CPU worker replaces by no-ops for the whole process, as (owner, name)."""
    import torch

    names = [
        (torch, "set_num_threads Event"),
        (torch.cuda, "Event Stream set_stream current_stream stream"),
        (torch.accelerator, "synchronize empty_cache get_memory_info"),
        (torch.Tensor, "pin_memory record_stream"),
    ]
    return [(owner, name) for owner, group in names for name in group.split() if hasattr(owner, name)]


class Guest:
    """Keeps an engine from disturbing the process it is a guest of.

    Enter `inside()` around every engine call. Inside, random states, torch's settings and attributes, and environment
    variables are the engine's, so that unseeded sampling goes on where the last call stopped. Outside they are the
    host's, as if nothing had happened.
    """

    def __init__(self) -> None:
        self._random: RandomStates | None = None
        self._settings: Settings | None = None
        self._attributes: dict[tuple[int, str], Any] = {}
        self._environment: dict[str, str] = {}
        self._entered = False

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The engine's turn. Entering it twice is entering it once."""
        if self._entered:
            yield
            return
        attributes = _attributes_an_engine_may_replace()
        originals = [getattr(owner, name) for owner, name in attributes]
        settings, states, environment = Settings(), RandomStates(), _environment()
        for mine in (self._random, self._settings):
            if mine is not None:
                mine.restore()
        for owner, name in attributes:
            _assign(owner, name, self._attributes.get((id(owner), name)))
        os.environ.update(self._environment)
        self._entered = True
        try:
            yield
        finally:
            self._entered = False
            self._random, self._settings = RandomStates(), Settings()
            for (owner, name), original in zip(attributes, originals, strict=True):
                self._attributes[id(owner), name] = getattr(owner, name)
                _assign(owner, name, original)
            states.restore()
            settings.restore()
            self._environment = _restore_environment(environment)


def _assign(owner: Any, name: str, value: Any) -> None:
    if value is not None and getattr(owner, name) is not value:
        setattr(owner, name, value)


def _environment() -> dict[bytes, bytes]:
    # As bytes: decoding a hundred variables four times an update takes half a millisecond.
    return dict(os.environb)


def _restore_environment(before: dict[bytes, bytes]) -> dict[str, str]:
    """Put environment variables back, and return those that had changed."""
    now = _environment()
    if now == before:
        return {}
    # vLLM reads its own variables again at any time (VLLM_DIST_IDENT names a shared-memory group), so those stay.
    mine = {n: v for n, v in now.items() if before.get(n) != v and not n.startswith(b"VLLM_")}
    for name in mine.keys() - before.keys():
        del os.environb[name]
    for name, value in before.items():
        if not name.startswith(b"VLLM_") and now.get(name) != value:
            os.environb[name] = value
    return {os.fsdecode(name): os.fsdecode(value) for name, value in mine.items()}
