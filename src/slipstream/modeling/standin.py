"""What is called in the place of a model's head, and what the model makes of a head's output.

Legend: B rows, T tokens a row, H hidden size, N completion tokens, V vocabulary.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from slipstream.modeling.attention import Layout, row_of
from slipstream.modeling.heads import Logits, score_linear, score_module, scores
from slipstream.records import MicroBatch, Segment

# For heads that do not say how large theirs is: it decides how many rows make a chunk.
ASSUMED_VOCABULARY = 2**17


@dataclass(frozen=True, slots=True)
class Settings:
    """What `score_tokens` was asked for."""

    temperature: float
    entropy_gradient: bool
    float32: bool
    chunk_rows: int | None


class StandIn:
    """Is called in the place of a head's forward pass, within the model's.

    There wrappers like FSDP have the head's weights at hand, which they have not before and afterwards.
    """

    def __init__(self, head: nn.Module, batch: MicroBatch, settings: Settings) -> None:
        self.head, self.batch, self.settings = head, batch, settings
        self.own_forward = head.forward
        self.is_linear = type(head).forward is nn.Linear.forward and "forward" not in vars(head)

    @torch.compiler.disable
    def __call__(self, hidden_BTH: Tensor) -> Tensor:
        return self.answer(hidden_BTH.flatten(0, -2)[self.batch.positions_N])

    def answer(self, hidden_NH: Tensor) -> Tensor:
        raise NotImplementedError


class Chunks(StandIn):
    """Scores completion tokens a chunk of logits at a time; the model is given their log-probabilities as logits."""

    def __init__(self, head: nn.Module, batch: MicroBatch, settings: Settings, logits: Logits) -> None:
        super().__init__(head, batch, settings)
        self.logits = logits

    def answer(self, hidden_NH: Tensor) -> Tensor:
        targets_N, settings, head = self.batch.targets_N, self.settings, self.head
        options: dict[str, Any] = {
            "entropy_gradient": settings.entropy_gradient, "chunk_rows": settings.chunk_rows,
        }  # fmt: skip
        if settings.float32 or self.is_linear:
            weight, bias = cast(Tensor, head.weight), cast("Tensor | None", getattr(head, "bias", None))
            dtype = torch.float32 if settings.float32 else _product_dtype(weight)
            self.result = score_linear(hidden_NH, weight, bias, targets_N, self.logits, dtype=dtype, **options)
        else:
            vocabulary = int(getattr(head, "out_features", ASSUMED_VOCABULARY))
            self.result = score_module(self.own_forward, hidden_NH, vocabulary, targets_N, self.logits, **options)
        return self.result[0].unsqueeze(-1)

    def scores(self, returned: Tensor) -> tuple[Tensor, Tensor]:
        # Not `returned` itself, which mixed precision may have rounded.
        logps_N, entropies_N = self.result
        logps_N = _Tied.apply(logps_N, returned)
        return logps_N, _Tied.apply(entropies_N, returned) if self.settings.entropy_gradient else entropies_N


class Whole(StandIn):
    """Applies the head at completion positions; what the model makes of its output cannot be done in chunks."""

    def answer(self, hidden_NH: Tensor) -> Tensor:
        if not self.settings.float32:
            return self.own_forward(hidden_NH)
        weight, bias = cast(Tensor, self.head.weight), cast("Tensor | None", getattr(self.head, "bias", None))
        with torch.autocast(hidden_NH.device.type, enabled=False):
            return nn.functional.linear(hidden_NH.float(), weight.float(), None if bias is None else bias.float())

    def scores(self, returned: Tensor) -> tuple[Tensor, Tensor]:
        logps_N, entropies_N, _ = scores(returned, self.batch.targets_N, Logits(temperature=self.settings.temperature))
        return logps_N, entropies_N if self.settings.entropy_gradient else entropies_N.detach()


class _Tied(torch.autograd.Function):
    """Values, of which a backward pass begins at what the model returned.

    There it meets the hooks of wrapped models, which fetch weights for it. The gradient that it brings there is zero.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, returned: Tensor) -> Tensor:
        ctx.save_for_backward(returned)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.zeros_like(ctx.saved_tensors[0])


def _product_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


@contextmanager
def instead_of(head: nn.Module, stand_in: Callable[[Tensor], Tensor]) -> Iterator[None]:
    own = vars(head).get("forward")
    head.forward = stand_in
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


_logits: weakref.WeakKeyDictionary[nn.Module, Logits | None] = weakref.WeakKeyDictionary()


def logits_of(model: nn.Module, head: nn.Module, batch: MicroBatch) -> Logits | None:
    """How the logits follow from the output of `head`; None if in a way that is not known here.

    Found out once a head: it is made to return known numbers, and what the model makes of them is looked at.
    """
    if head not in _logits:
        _logits[head] = _observed(model, head, batch)
    return _logits[head]


def _observed(model: nn.Module, head: nn.Module, batch: MicroBatch) -> Logits | None:
    sizes = torch.tensor([2.0**-6, 1.0, 5.0, 20.0, 100.0, 2.0**20], device=batch.input_ids_BT.device)
    given = torch.cat([sizes, -sizes])
    ids = batch.input_ids_BT[:1, :2]
    devices = [given.device] if given.is_cuda else []
    # Dropout must not use up random numbers, and a compiled model not be compiled for this. The model may attend within
    # packed rows already.
    with (
        torch.no_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"),
        row_of(Layout((Segment(ids.shape[1]),), given.device)),
        instead_of(head, lambda hidden: given.expand(*hidden.shape[:-1], -1)),
    ):  # fmt: skip
        seen = model(input_ids=ids, use_cache=False).logits
    if seen.shape != (*ids.shape, len(given)):
        raise RuntimeError(
            f"the model returned logits of shape {tuple(seen.shape)} where {(*ids.shape, len(given))} was expected: "
            f"{type(model).__name__} does not compute them through its output embedding {type(head).__name__}, so it "
            "cannot be trained here."
        )
    seen = seen[0, 0]
    if torch.equal(seen, given.to(seen.dtype)):
        return Logits()
    smallest, largest = seen[0].item(), seen[len(sizes) - 1].item()
    guesses = [Logits(smallest / sizes[0].item())]
    if 0 < smallest < largest:
        guesses.append(Logits(math.atanh(smallest / largest) * largest / sizes[0].item(), cap=largest))
    fitting = (g for g in guesses if torch.allclose(g.of(given), seen, rtol=1e-5, atol=1e-6))
    # Rounded numbers do not show a factor exactly.
    return next(fitting, None) if seen.dtype == torch.float32 else None
