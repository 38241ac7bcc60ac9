"""The texts of many completions at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast


def texts_of(tokenizer: Any, completion_ids: Sequence[Sequence[int]]) -> list[str]:
    """`tokenizer.batch_decode(completion_ids, skip_special_tokens=True)`.

    Where that is nothing but the tokenizers library's own decoding of one after the other, the library decodes them
    side by side.
    """
    lists = [list(ids) for ids in completion_ids]
    if not lists:  # of which transformers makes one text
        return []
    if _decodes_plainly(tokenizer):
        return list(tokenizer.backend_tokenizer.decode_batch(lists, skip_special_tokens=True))
    return list(tokenizer.batch_decode(lists, skip_special_tokens=True))


def _decodes_plainly(tokenizer: Any) -> bool:
    """Whether neither its class nor itself has a way of its own, and nothing is cleaned up afterwards."""
    for name in ("batch_decode", "decode", "_decode"):
        if getattr(getattr(tokenizer, name, None), "__func__", None) is not getattr(PreTrainedTokenizerFast, name):
            return False
    return not tokenizer.clean_up_tokenization_spaces
