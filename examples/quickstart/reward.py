"""The quickstart's reward: 1 for the right answer, 0 for any other."""

from __future__ import annotations

from typing import Any


def correct(completions: list[list[dict[str, str]]], solution: list[str], **columns: Any) -> list[float]:
    """1.0 where the assistant's message is the solution and nothing else."""
    answers = [messages[-1]["content"].strip() for messages in completions]
    return [float(answer == right) for answer, right in zip(answers, solution, strict=True)]
