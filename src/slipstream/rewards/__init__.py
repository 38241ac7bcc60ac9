"""Ready reward functions. `f(prompts, completions, completion_ids, **columns)` gives one float, or None, a completion.

Completions are strings, or lists of messages of which the last assistant message counts. None means "not scorable":
the row gets no reward from this function, which is not the same as a reward of zero.
"""

from slipstream.rewards.accuracy import accuracy_reward, reasoning_accuracy_reward
from slipstream.rewards.formats import think_format_reward
from slipstream.rewards.marks import rowwise as rowwise  # no reward itself, so not in the list below
from slipstream.rewards.shaping import (
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
)

__all__ = [
    "accuracy_reward",
    "get_cosine_scaled_reward",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
    "reasoning_accuracy_reward",
    "think_format_reward",
]
