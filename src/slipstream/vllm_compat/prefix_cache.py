"""Cached prefixes: hashed once for all completions of a prompt, forgotten in a time that depends on what is cached.

To vLLM's engine core, `n` completions of a prompt are `n` requests that come one after the other, and it hashes the
prompt's blocks for each. A request with the tokens of the one before takes what that one got: 2 ms instead of 15 for 16
prompts of 1000 tokens and 8 completions each, which a GPU waits for. Known for vLLM 0.26 to 0.33.
"""

from __future__ import annotations

import functools
from typing import Any

VERSIONS = ("0.26.", "0.27.", "0.28.", "0.29.", "0.30.", "0.31.", "0.32.", "0.33.")
"""vLLM's versions that were read, and are tested, for what goes into a hash."""

_HASHER = ("vllm.v1.core.kv_cache_utils", "get_request_block_hasher.<locals>.request_block_hasher")


def quicken(core: Any, version: str) -> None:
    """Let an engine core reset its cached prefixes quickly, and hash each prompt once. What is not known stays vLLM's.

    Args:
        core: vLLM's `EngineCore`, in this process.
        version: Of vLLM.
    """
    reset_quickly(core.scheduler)
    hash_once(core, version)


def hash_once(core: Any, version: str) -> None:
    """Let an engine core hash a prompt once for all of its completions."""
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


def reset_quickly(scheduler: Any) -> None:
    """Let a scheduler's reset of cached prefixes look only at the blocks that have contents.

    vLLM's goes through all blocks of the cache: a hundred thousand on a GPU, which takes a tenth of a second. Where the
    cache is not as it is known here, vLLM's own stays.
    """
    pool = getattr(getattr(scheduler, "kv_cache_manager", None), "block_pool", None)
    if hasattr(pool, "reset_prefix_cache") and hasattr(pool, "blocks"):
        pool.reset_prefix_cache = functools.partial(_reset, pool, pool.reset_prefix_cache)  # type: ignore[union-attr]


def _reset(pool: Any, reset: Any) -> Any:
    contents = getattr(getattr(pool, "cached_block_hash_to_block", None), "_cache", None)
    if contents is None or getattr(pool, "_reuse_watchers", None):  # others look at blocks as well
        return reset()
    every = pool.blocks
    pool.blocks = [b for found in contents.values() for b in (found.values() if isinstance(found, dict) else (found,))]
    try:
        return reset()
    finally:
        pool.blocks = every
