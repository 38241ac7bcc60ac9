"""Which requests, and when, a batch that only decodes can be made of. See `steady`."""

from __future__ import annotations

from typing import Any


def undisturbed(scheduler: Any) -> bool:
    """Whether nothing is to be done but to go on: no pause, and no request that the batch may have a place for."""
    running, waiting = scheduler.get_request_counts()
    return scheduler._pause_state.name == "UNPAUSED" and not (waiting and running < scheduler.max_num_running_reqs)


def ends(params: Any) -> list[int]:
    """Tokens that may end a sequence; vLLM's own code decides."""
    end = params.eos_token_id
    return [*([] if end is None else [end]), *(params.stop_token_ids or ())]


def decodes(request: Any) -> bool:
    """Whether the next step gives it one token, and nobody wants to know before it ends."""
    return (
        request.num_tokens + request.num_output_placeholders - request.num_computed_tokens == 1
        and not request.is_prefill_chunk
        and not request.spec_token_ids
        and _qualifies(request)
    )


def _qualifies(request: Any) -> bool:
    known: bool | None = getattr(request, "_slipstream_qualifies", None)
    if known is None:
        params = request.sampling_params
        known = request._slipstream_qualifies = (
            params is not None
            and params.output_kind.name == "FINAL_ONLY"
            and params.logprobs in (None, 0)
            and not getattr(params, "logprob_token_ids", None)
            and params.prompt_logprobs is None
            and not params.stop
            and getattr(params, "repetition_detection", None) is None
            and not request.use_structured_output
            and not request.has_encoder_inputs
            and not request.resumable
            and request.pooling_params is None
        )
    return known
