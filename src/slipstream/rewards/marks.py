"""Marking reward functions that look at one completion at a time."""

from __future__ import annotations

from typing import TypeVar

Function = TypeVar("Function")


def rowwise(function: Function) -> Function:
    """Mark a reward function whose value for a completion does not depend on the other completions of a call.

    Such a function is called in a thread of its own, for some prompts' completions at a time (all of a prompt's
    together on a rank), while the engine samples the others; so it takes no time where generation takes longer. How
    many it is given together is not fixed. It must not draw from global random states, and gets no `log_metric`: a mean
    would depend on how completions were put together. Coroutine functions and wrappers (functools.wraps) of a marked
    function are called as if they were not marked.

    Example:
        ```python
        @slipstream.rewards.rowwise
        def digits(completions, **_):
            return [sum(c.isdigit() for c in text) for text in completions]
        ```
    """
    function.rowwise = True  # type: ignore[attr-defined]
    return function
