"""Log-probabilities of the sampled tokens, kept on the device and fetched once a call instead of once a token.

vLLM hands log-probabilities on as Python objects, every token through its scheduler and its output processor, which
takes longer than sampling does. Here requests ask vLLM for none. What they were sampled with is gathered where vLLM
samples, a tensor (sequences,) a step, and joined with the requests' names when the call ends.

Two of vLLM's model runners are known: `gpu_model_runner` (V1, also under the CPU's) and `gpu.model_runner` (V2, chosen
for dense models on CUDA). In front of anything else `install` gives up, and vLLM's own way is taken.
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

MODE = "processed_logprobs"
STEPS_ON_DEVICE = 256
"""Steps between two copies to the host: few enough to bound the memory, many enough to cost nothing."""

_V1_RUNNER = ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner")
_V1_SAMPLER = ("vllm.v1.sample.sampler", "Sampler")
_V2_RUNNER = ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner")
_V2_SAMPLER = ("vllm.v1.worker.gpu.sample.sampler", "Sampler")

# 3_17-0a1b2c3d: completion 3 of request 17. Without the first part there is one completion, the last may be missing.
_NAME = re.compile(r"(?:(\d+)_)?(\d+)(?:-\w+)?")


class Recorded:
    """What was recorded in one call.

    Args:
        samples: Token ids (steps,) and their log-probabilities (steps,) by vLLM's own names of sequences.
    """

    def __init__(self, samples: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        self._samples: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
        for name, sample in samples.items():
            parts = _NAME.fullmatch(name)
            if parts is None:
                raise RuntimeError(f"generate: vLLM calls a sequence {name!r}, a form of name that is not known here")
            self._samples[parts[2], int(parts[1] or 0)] = sample

    def of(self, request: str, index: int, ids: Sequence[int]) -> list[float]:
        """Log-probabilities of `ids`, completion `index` of the request that vLLM's caller knows as `request`.

        Raises:
            RuntimeError: Other tokens were recorded.
        """
        tokens, logps = self._samples.get((request, index), (np.empty(0, np.int64), np.empty(0, np.float32)))
        # With asynchronous scheduling a sequence is sampled once more before its end is known.
        if len(tokens) < len(ids) or not np.array_equal(tokens[: len(ids)], ids):
            raise RuntimeError(
                f"generate: completion {index} of request {request} has {len(ids)} tokens, and the log-probabilities "
                f"recorded for it are of {len(tokens)} others. Please report this; until it is mended, "
                "fast_logprobs=False takes vLLM's own log-probabilities."
            )
        found: list[float] = logps[: len(ids)].tolist()
        return found

    def of_sample(self, request: str, sample: Any, ids: Sequence[int]) -> list[float]:
        """The same for vLLM's output `sample` of the request, whose token ids are `ids`."""
        return self.of(request, sample.index, ids)


@dataclass
class Recorder:
    """Collects, while it is on, a step's sampled tokens and their log-probabilities.

    Attributes:
        on: Whether steps are recorded.
        logps: Log-probabilities (sequences,) of the step that is under way, until `step` takes them.
    """

    on: bool = False
    logps: Tensor | None = None
    _numbers: dict[str, int] = field(default_factory=dict)
    _last_names: list[str] = field(default_factory=list)
    _last_rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _rows: list[np.ndarray] = field(default_factory=list)
    _steps: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    _fetched: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    def step(self, names: Sequence[str], tokens: Tensor, kept: Tensor) -> None:
        """Record one step.

        Args:
            names: Of the sequences of the batch.
            tokens: Sampled token ids (sequences, 1).
            kept: Not 0 (sequences,) where the token counts: half of a prompt samples one that does not.
        """
        logps, self.logps = self.logps, None
        if logps is None or not len(names) == len(logps) == len(tokens) == len(kept):
            raise RuntimeError(
                f"vLLM sampled {tuple(tokens.shape)} tokens for {len(names)} sequences and gave log-probabilities "
                f"{None if logps is None else tuple(logps.shape)}: set fast_logprobs=False and report this"
            )
        # Decoding, the same sequences come again and again.
        if names != self._last_names:
            self._last_names = list(names)
            numbers = self._numbers
            self._last_rows = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
        self._rows.append(self._last_rows)
        self._steps.append((tokens[:, 0], logps, kept))
        if len(self._steps) == STEPS_ON_DEVICE:
            self._fetch()

    def _fetch(self) -> None:
        if self._steps:
            joined = (torch.cat(parts).cpu().numpy() for parts in zip(*self._steps, strict=True))
            self._fetched.append(tuple(joined))
            self._steps.clear()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the steps within; what an earlier call left is dropped."""
        self._clear()
        self.on = True
        try:
            yield
        finally:
            self.on = False

    def take(self) -> Recorded:
        """What was recorded, by sequence, in the order of the steps."""
        if self._steps and self._steps[0][0].is_cuda:
            torch.cuda.synchronize(self._steps[0][0].device)  # the engine may sample on a stream of its own
        self._fetch()
        samples = {}
        if self._fetched:
            rows = np.concatenate(self._rows)
            tokens, logps, kept = (np.concatenate(parts) for parts in zip(*self._fetched, strict=True))
            counts = kept != 0
            rows, tokens, logps = rows[counts], tokens[counts], logps[counts]
            order = np.argsort(rows, kind="stable")
            ends = np.cumsum(np.bincount(rows, minlength=len(self._numbers)))[:-1]
            parts = zip(np.split(tokens[order], ends), np.split(logps[order], ends), strict=True)
            samples = dict(zip(self._numbers, parts, strict=True))
        self._clear()
        return Recorded(samples)

    def _clear(self) -> None:
        self.logps = None
        for kept in (self._numbers, self._last_names, self._rows, self._steps, self._fetched):
            kept.clear()


def install(worker: Any) -> Recorder | None:
    """Let the model runner of `worker` tell a recorder what it samples. None, and a warning, where that is not known.

    Args:
        worker: vLLM's, in this process.
    """
    runner = worker.model_runner
    why, watch = _way(runner, worker.vllm_config)
    if watch is None:
        warnings.warn(
            f"log-probabilities of sampled tokens are taken from vLLM's outputs, which is slower, since {why}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    recorder = Recorder()
    watch(runner, recorder)
    return recorder


def _way(runner: Any, config: Any) -> tuple[str, Callable[[Any, Recorder], None] | None]:
    """How to watch `runner`, or why that is not possible."""
    if config.speculative_config is not None:
        return "the engine decodes speculatively", None
    if config.parallel_config.pipeline_parallel_size > 1:
        return "the model is spread over a pipeline", None
    if config.model_config.logprobs_mode != MODE:
        return f"logprobs_mode is {config.model_config.logprobs_mode!r}", None
    sampler, names = getattr(runner, "sampler", None), tuple[str, ...]()
    if isinstance(runner, _class(*_V1_RUNNER)):
        names, known, watch = ("_sample", "discard_request_mask"), _class(*_V1_SAMPLER), _watch_v1
    elif isinstance(runner, _class(*_V2_RUNNER)):
        if getattr(runner, "batch_sharder", None) is not None:
            return "ranks sample parts of the batch", None
        names, known, watch = ("sample",), _class(*_V2_SAMPLER), _watch_v2
        if "return_logprobs" not in inspect.signature(known.sample).parameters:
            return "its sampler has changed", None
    else:
        return f"{type(runner).__name__} is not a known model runner", None
    if type(sampler) is not known or not all(hasattr(runner, name) for name in names):
        return f"{type(runner).__name__} samples with {type(sampler).__name__} in a way that is not known", None
    return "", watch


def _class(module: str, name: str) -> Any:
    """A class of vLLM's, or one without instances where this platform or version has no such module."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:  # V2 needs packages that the CPU build lacks
        return type(name, (), {})


def _watch_v1(runner: Any, recorder: Recorder) -> None:
    sampler = runner.sampler
    draw, sample = sampler.sample, runner._sample

    def drawing(logits: Tensor, metadata: Any, *args: Any, **options: Any) -> Any:
        sampled, logps = draw(logits, metadata, *args, **options)
        if recorder.on:
            chosen = logps
            if chosen is None:  # all greedy
                if not metadata.all_greedy:
                    raise RuntimeError("vLLM's sampler kept no log-probabilities: set fast_logprobs=False")
                chosen = sampler.compute_logprobs(logits)
            recorder.logps = chosen.gather(-1, sampled.long().unsqueeze(-1)).squeeze(-1)
        return sampled, logps

    def sampling(*args: Any, **options: Any) -> Any:
        output = sample(*args, **options)
        if recorder.on:
            names = runner.input_batch.req_ids
            dropped = torch.from_numpy(runner.discard_request_mask.np[: len(names)].copy())
            recorder.step(names, output.sampled_token_ids, ~dropped)
        return output

    sampler.sample, runner._sample = drawing, sampling


def _watch_v2(runner: Any, recorder: Recorder) -> None:
    from slipstream.vllm_compat.token_logps import token_logps

    sampler = runner.sampler
    draw, sample = sampler.sample, runner.sample

    def drawing(*args: Any, **options: Any) -> Any:
        if recorder.on:
            options["return_logprobs"] = True  # or a sampler that does not show what it leaves out may be taken
        drawn = draw(*args, **options)
        if recorder.on:
            recorder.logps = token_logps(drawn[1], drawn[0].view(-1))
        return drawn

    def sampling(hidden_states: Tensor, batch: Any, *args: Any, **options: Any) -> Any:
        output = sample(hidden_states, batch, *args, **options)
        if recorder.on:
            # A tensor on the device: whether a prompt ends within this step.
            recorder.step(batch.req_ids, output[0].sampled_token_ids, output[1])
        return output

    sampler.sample, runner.sample = drawing, sampling
