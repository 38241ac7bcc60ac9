"""Forgetting cached prefixes in a time that depends on what is cached, not on the size of the cache."""

from __future__ import annotations

import functools
from typing import Any


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
