"""The hashes of a prompt's blocks, computed once for all of its completions.

To vLLM's engine core, `n` completions of a prompt are `n` requests that come one after the other, and it hashes the
prompt's blocks for the prefix cache for each. A request with the tokens of the one before takes what that one got: 2 ms
instead of 15 for 16 prompts of 1000 tokens and 8 completions each, which a GPU waits for.

Known for vLLM 0.26 and 0.32; elsewhere `install` leaves everything as it is.
"""

from __future__ import annotations

from typing import Any

VERSIONS = ("0.26.", "0.32.")
"""vLLM's versions that were read, and are tested, for what goes into a hash."""

_HASHER = ("vllm.v1.core.kv_cache_utils", "get_request_block_hasher.<locals>.request_block_hasher")


def install(core: Any, version: str) -> None:
    """Let an engine core hash a prompt once for all of its completions.

    Args:
        core: vLLM's `EngineCore`, in this process.
        version: Of vLLM.
    """
    if not version.startswith(VERSIONS):
        return
    hasher = getattr(core, "request_block_hasher", None)  # None: without a prefix cache
    if (getattr(hasher, "__module__", None), getattr(hasher, "__qualname__", None)) == _HASHER:
        core.request_block_hasher = PromptHasher(hasher)


class PromptHasher:
    """vLLM's function from a request to the hashes of its blocks that have none yet, with a memory of one prompt."""

    def __init__(self, hasher: Any) -> None:
        self.hasher = hasher
        # One attribute: a server's requests are made in another thread than the one that adds their tokens.
        self.last: tuple[list[int], list[bytes]] = ([], [])

    def __call__(self, request: Any) -> list[bytes]:
        if (
            request.block_hashes or request.num_output_tokens
            # What vLLM hashes beside tokens.
            or request.mm_features or request.lora_request or request.cache_salt or request.prompt_embeds is not None
        ):  # fmt: skip
            return self.hasher(request)
        tokens, hashes = self.last
        # The numbers are compared, not the lists: every request has its own, and it grows. Of one prompt they are the
        # same objects, which takes 4 microseconds a thousand.
        if request._all_token_ids != tokens:
            tokens, hashes = request._all_token_ids.copy(), self.hasher(request)
            self.last = tokens, hashes
        return hashes
