"""The reward of the SmolLM2 example: is the answer right, and where it was asked for?"""

from __future__ import annotations

import re
from typing import Any

# On the last line and alone there, so that a model that lists several numbers gains nothing.
ANSWER = re.compile(r"(?:^|\n)#### (-?\d+)\s*\Z")


def correct(completions: list[Any], solution: list[str], **columns: Any) -> list[float]:
    """1.0 for a completion whose last line is `#### ` and the solution, else 0.0."""
    if len(solution) != len(completions):
        raise ValueError(f"solution has {len(solution)} values for {len(completions)} completions; they must match")
    matches = [ANSWER.search(completion[-1]["content"]) for completion in completions]
    return [
        float(match is not None and int(match[1]) == int(right)) for match, right in zip(matches, solution, strict=True)
    ]


def near(completions: list[Any], solution: list[str], **columns: Any) -> list[float]:
    """Up to 0.5 for an answer in its place, less the further it is from the solution; 0.0 for one that is elsewhere."""
    matches = [ANSWER.search(completion[-1]["content"]) for completion in completions]
    return [
        0.5 / (1 + abs(int(match[1]) - int(right))) if match is not None else 0.0
        for match, right in zip(matches, solution, strict=True)
    ]
