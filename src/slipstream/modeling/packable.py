"""Whether a model can be trained on packed rows, found out by trying."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from slipstream.modeling.logprobs import score_tokens
from slipstream.modeling.packing import Packer
from slipstream.records import Completion, MicroBatch, Prompt, Rollout, StepTotals

# Tokens of the rows that are tried: two completions of one prompt and one of another.
TRIAL = ((9, 7), (9, 5), (6, 8))
# A model that is right differs from itself by rounding, in bfloat16 by up to 3% of what it differs from one that sees
# other rows.
TOLERANCE = 0.1


def obstacle(model: nn.Module, head: nn.Module) -> str | None:
    """Why `model` cannot be trained on packed rows; None if it can.

    It is run on a few tokens: on padded rows; on the same rows packed, two of which share a prompt; on these with one
    row unknown, which others must not notice; and on all as one text, which shows how far off log-probabilities are
    that see other rows. All ranks get the same answer.

    Args:
        model: The (possibly wrapped) causal language model.
        head: Its output embedding.
    """
    weight = cast(Tensor, head.weight)
    chunks = {getattr(getattr(m, "config", None), "attention_chunk_size", None) for m in model.modules()} - {None}
    if chunks:
        # Its layers are told the size of a chunk as if it were a window's.
        reason: str | None = f"attention_chunk_size={chunks.pop()}: attention in chunks"
    else:
        reason = _trial(model, head, weight)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        found = torch.tensor(float(reason is not None), device=weight.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        if found > 0 and reason is None:
            reason = "it does not work on another rank"
    return reason


def _trial(model: nn.Module, head: nn.Module, weight: Tensor) -> str | None:
    packer = Packer(len(TRIAL), 0, weight.device)
    rollouts, totals = _rollouts(weight.shape[0]), StepTotals(len(TRIAL), 1.0, 1)
    packed = packer.packed_micro_batch(rollouts, totals, share=True)
    as_one_text = packer.packed_micro_batch(rollouts, totals, share=True)
    as_one_text.layout = as_one_text.position_ids_BT = None

    def score(batch: MicroBatch) -> Tensor:
        return score_tokens(model, head, batch, temperature=1.0).logps_N

    with torch.no_grad(), _evaluating(model), torch.compiler.set_stance("force_eager"):
        expected, leaking = score(packer.micro_batch(rollouts, totals)), score(as_one_text)
        try:
            found = score(packed)
            # The prompt is followed by the first completion.
            with _unknown_tokens(model, slice(TRIAL[0][0], sum(TRIAL[0]))):
                first, *others = packed.split_rows(score(packed))
        except Exception as error:  # noqa: BLE001
            return f"{type(error).__name__}: {error}"
    if not first[1:].isnan().all() or any(values.isnan().any() for values in others):
        return "its layers carry something from one row to the next"
    wrong, leak = (found - expected).abs().mean().item(), (leaking - expected).abs().mean().item()
    if wrong <= TOLERANCE * leak:
        return None
    return (
        f"log-probabilities of packed rows differ by {wrong:.2g} from those of padded rows, and by {leak:.2g} if rows "
        "see each other: it leaves position_ids out, or its attention has terms that packed rows do not have"
    )


@contextmanager
def _unknown_tokens(model: nn.Module, columns: slice) -> Iterator[None]:
    """Make the embeddings of these tokens NaN, and so everything that depends on them."""

    def spoil(module: nn.Module, args: tuple[Any, ...], embedded_BTH: Tensor) -> Tensor:
        spoiled = embedded_BTH.clone()
        spoiled[:, columns] = torch.nan
        return spoiled

    owner: Any = next(m for m in model.modules() if hasattr(m, "get_input_embeddings"))
    hook = owner.get_input_embeddings().register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


def _rollouts(vocabulary: int) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)
    # High ids may mean images and the like.
    prompt = torch.randint(min(vocabulary, 1000), (max(p for p, _ in TRIAL),), generator=generator).tolist()
    rollouts = []
    for p, c in TRIAL:
        ids = torch.randint(min(vocabulary, 1000), (c,), generator=generator).tolist()
        rollouts.append(Rollout(Prompt(prompt[:p], {}, 0), Completion(ids, None, 0, "stop"), "", False))
    return rollouts


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
