"""Rewards for the shape of the text alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from slipstream.rewards.inputs import texts
from slipstream.rewards.marks import rowwise

_THINK = re.compile(r"^<think>(?!.*<think>)(.*?)</think>.*$", re.DOTALL | re.MULTILINE)


@rowwise
def think_format_reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 where the text starts with the one `<think>` it has and closes it, else 0.0.

    Args:
        completions: Strings, or lists of messages.
    """
    return [1.0 if _THINK.match(text) else 0.0 for text in texts(completions)]
