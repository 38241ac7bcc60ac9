"""Log-probabilities and entropies of completion tokens under a model.

Legend: B rows, T tokens a row, H hidden size, N completion tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from slipstream.modeling.attention import is_packed, packed_attention, row_of
from slipstream.modeling.standin import Chunks, Settings, Whole, instead_of, logits_of
from slipstream.records import MicroBatch


@dataclass(slots=True)
class PolicyOutput:
    """What a model says about the completion tokens of a micro-batch.

    Attributes:
        logps_N: Log-probability of each completion token, float32, differentiable.
        entropies_N: Entropy of the distribution it was drawn from, float32; None if not asked for. Without gradient,
            unless that was asked for.
        router_loss: The load balancing loss of a mixture of experts, if it was asked for.
    """

    logps_N: Tensor
    entropies_N: Tensor | None
    router_loss: Tensor | None = None


def score_tokens(
    model: nn.Module,
    head: nn.Module,
    batch: MicroBatch,
    *,
    temperature: float,
    entropies: bool = False,
    entropy_gradient: bool = False,
    router_loss: bool = False,
    float32_head: bool = False,
    chunk_rows: int | None = None,
) -> PolicyOutput:
    """Run `model` once and score the completion tokens of `batch`.

    The backward pass of a packed micro-batch belongs into `attention.packed_attention(model)`.

    Args:
        model: The (possibly wrapped) causal language model; it is called as a whole, so that the hooks of DDP and FSDP
            run.
        head: Its output embedding, which is applied at completion positions alone.
        batch: The rows.
        temperature: Logits are divided by it, as they were when the tokens were sampled.
        entropies: Whether to return entropies as well.
        entropy_gradient: Whether gradients flow through them.
        router_loss: Whether to compute the load balancing loss of a mixture of experts. Where completions share a
            prompt, its tokens count once.
        float32_head: Whether to compute the logits in float32, whatever the model computes in.
        chunk_rows: Positions whose logits are held at a time; None: as many as the device is good for.
    """
    if float32_head and hasattr(head, "base_layer"):
        raise ValueError(
            "cast_lm_head_to_fp32=True does not go with an adapter on the output embedding, which it would leave out: "
            "take lm_head out of target_modules, or set cast_lm_head_to_fp32=False."
        )
    settings = Settings(temperature, entropy_gradient, float32_head, chunk_rows)
    logits = logits_of(model, head, batch)
    stand_in: Chunks | Whole
    if logits is None:
        stand_in = Whole(head, batch, settings)
    else:
        stand_in = Chunks(head, batch, settings, replace(logits, temperature=temperature))
    with instead_of(head, stand_in):
        answer = _run(model, batch, router_loss)
    logps_N, entropies_N = stand_in.scores(answer.logits)
    if batch.layout is not None and logps_N.requires_grad:
        logps_N.register_hook(lambda _: _check_backward(model))
    return PolicyOutput(logps_N, entropies_N if entropies else None, answer.aux_loss if router_loss else None)


def _run(model: nn.Module, batch: MicroBatch, router_loss: bool) -> Any:
    # Padding stands on the right (see Packer), so that no real token sees it: attention needs no mask.
    options: dict[str, Any] = {"use_cache": False, **batch.features}
    if router_loss:
        options["output_router_logits"] = True
    if batch.position_ids_BT is not None:
        options["position_ids"] = batch.position_ids_BT
    if router_loss or batch.layout is not None:
        # The experts do see padding, and it must not count in their balance. And without a mask, transformers looks at
        # a packed row's positions for what our layout says already, and the host waits for the device.
        options["attention_mask"] = batch.attention_mask_BT
    if batch.layout is None:
        return model(input_ids=batch.input_ids_BT, **options)
    with packed_attention(model), row_of(batch.layout):
        return model(input_ids=batch.input_ids_BT, **options)


def _check_backward(model: nn.Module) -> None:
    if not is_packed(model):
        raise RuntimeError(
            "the backward pass of a packed micro-batch must run within `packed_attention(model)`: gradient "
            "checkpointing would compute another attention than the forward pass."
        )
