"""How many tokens a packed micro-batch may have: measured on two small ones before the first optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

# Tokens of the larger of the two: enough for the chunks of logits to have their full size in most vocabularies.
TRIAL_TOKENS = 16384
# No attempt is made with fewer: a device that has no room for these has none for training either.
LEAST_TRIAL = 512
# Part of the free memory that is used; the rest is for blocks that do not fit and rows that cost more than these.
USED = 0.8
MULTIPLE = 256
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True, slots=True)
class Budget:
    """What was found out.

    Attributes:
        tokens: Of a packed micro-batch, at most.
        bytes_per_token: Memory that a token takes in a forward and backward pass.
        fixed: Memory that such a pass takes whatever its size, in bytes.
        free: Memory that there is for it, in bytes.
    """

    tokens: int
    bytes_per_token: float
    fixed: float
    free: int

    def __str__(self) -> str:
        """One line for the log."""
        return (
            f"max_tokens_per_micro_batch {self.tokens} (measured: {self.bytes_per_token / MIB:.2f} MiB a token, "
            f"{self.free / GIB:.1f} GiB free)"
        )


class Meter(Protocol):
    """Measures a device's memory, in bytes."""

    def free(self) -> int:
        """What could be allocated now."""
        ...

    def peak(self, step: Callable[[], object]) -> int:
        """The most that `step` took at a time, beyond what there was before."""
        ...


class CudaMeter:
    """Measures the memory of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free(self) -> int:
        """What the driver has left when torch's unused blocks are given back: some of them may be of no use here."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def peak(self, step: Callable[[], object]) -> int:
        """The most that torch's tensors took. The device's own peak begins anew."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def measured_budget(
    run: Callable[[int], int], meter: Meter, *, least: int, most: int, promised: int = 0, agree: Callable[[int], int]
) -> Budget:
    """The largest budget whose forward and backward pass fits into the memory that is free now.

    Peaks of two small passes give the line `fixed + bytes_per_token * tokens`; the budget is where it reaches four
    fifths of what is free, rounded down to a multiple of 256.

    Args:
        run: Makes a forward and backward pass of about so many tokens and returns how many it had. The gradients that
            it leaves count as taken, not as a part of the pass.
        meter: Measures memory.
        least: Tokens of the largest unit that cannot be cut: the budget is no smaller.
        most: Tokens that an optimizer step may have: the budget is no larger.
        promised: Bytes that are free now and will be taken: the optimizer's state.
        agree: Given a number, returns the largest of all ranks.

    Raises:
        torch.OutOfMemoryError: Not even `LEAST_TRIAL` tokens fit, or a single unit.
    """
    least, most = agree(least), agree(most)
    (few, low), (many, high) = _two_peaks(run, meter, min(TRIAL_TOKENS, most))
    # Where both are the same rows, or the larger took no more, all of it is put down to the tokens.
    slope = (high - low) / (many - few) if many > few and high > low else high / many
    fixed = max(high - slope * many, 0.0)
    free = max(meter.free() - promised, 0)
    fitting = int((USED * free - fixed) / slope) if slope > 0 else most
    # Every rank has to make as many micro-batches as the others, so that the largest budget is the smallest rank's.
    tokens = -agree(-max(fitting, 0)) // MULTIPLE * MULTIPLE
    return Budget(max(min(tokens, _rounded_up(most)), _rounded_up(least)), slope, fixed, free)


def _two_peaks(run: Callable[[int], int], meter: Meter, tokens: int) -> tuple[tuple[int, int], tuple[int, int]]:
    while True:
        try:
            return _peak(run, meter, tokens // 2), _peak(run, meter, tokens)
        except torch.OutOfMemoryError:
            if tokens // 2 < LEAST_TRIAL:
                raise
        tokens //= 2


def _peak(run: Callable[[int], int], meter: Meter, tokens: int) -> tuple[int, int]:
    # The first time, kernels are compiled and chosen, and gradients come into being.
    had = run(tokens)
    return had, meter.peak(lambda: run(tokens))


def _rounded_up(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


@contextmanager
def gradients_aside(model: nn.Module) -> Iterator[None]:
    """Let `model` have other gradients inside, none at first, and afterwards those that it had."""
    parameters = list(model.parameters())
    before = [p.grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def optimizer_promise(optimizer: Any, model: nn.Module) -> int:
    """Bytes that an optimizer which has no state yet will take: two values a parameter, as AdamW's.

    Others take less, and leave some memory unused.
    """
    if optimizer is not None and any(optimizer.state.values()):
        return 0
    return 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
