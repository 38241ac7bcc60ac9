"""Rewards for length and repetition, computed on token ids. The factories return picklable callables with a name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from slipstream.rewards.accuracy import accuracy_reward
from slipstream.rewards.inputs import check_number, same_length
from slipstream.rewards.marks import rowwise

RewardFunction = Callable[..., list[float | None]]


@rowwise
@dataclass(frozen=True)
class _CosineScaled:
    __name__: ClassVar[str] = "cosine_scaled_reward"

    max_len: int
    min_value_wrong: float
    max_value_wrong: float
    min_value_correct: float
    max_value_correct: float

    def __post_init__(self) -> None:
        check_number("max_len", self.max_len, integer=True)
        if self.max_len < 1:
            raise ValueError(f"max_len must be at least 1 token, got {self.max_len}")
        for kind in ("wrong", "correct"):
            low, high = getattr(self, f"min_value_{kind}"), getattr(self, f"max_value_{kind}")
            check_number(f"min_value_{kind}", low)
            check_number(f"max_value_{kind}", high)
            if low > high:
                raise ValueError(f"min_value_{kind} must not exceed max_value_{kind}, got {low} > {high}")

    def __call__(
        self,
        completions: Sequence[Any],
        solution: Sequence[Any] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        same_length(completions, solution=solution, completion_ids=completion_ids)
        assert completion_ids is not None
        correct = accuracy_reward(completions, solution)
        return [
            None if right is None else self._value(right > 0, len(ids))
            for right, ids in zip(correct, completion_ids, strict=True)
        ]

    def _value(self, correct: bool, length: int) -> float:
        # Past max_len the cosine would climb again; the progress stays at its end instead.
        swing = (1.0 + math.cos(math.pi * min(length / self.max_len, 1.0))) / 2
        if correct:
            return self.min_value_correct + (self.max_value_correct - self.min_value_correct) * swing
        return self.max_value_wrong + (self.min_value_wrong - self.max_value_wrong) * swing


@rowwise
@dataclass(frozen=True)
class _RepetitionPenalty:
    __name__: ClassVar[str] = "repetition_penalty_reward"

    ngram_size: int
    max_penalty: float

    def __post_init__(self) -> None:
        check_number("ngram_size", self.ngram_size, integer=True)
        check_number("max_penalty", self.max_penalty)
        if self.ngram_size < 1:
            raise ValueError(f"ngram_size must be at least 1 token, got {self.ngram_size}")
        if self.max_penalty > 0:
            raise ValueError(f"max_penalty must be zero or negative (it is a reward), got {self.max_penalty}")

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float | None]:
        return [self._value(ids) for ids in completion_ids]

    def _value(self, ids: Sequence[int]) -> float:
        total = len(ids) - self.ngram_size + 1
        if total < 1:
            return 0.0
        unique = len({tuple(ids[start : start + self.ngram_size]) for start in range(total)})
        return (1 - unique / total) * self.max_penalty if unique < total else 0.0


@rowwise
@dataclass(frozen=True)
class _SoftOverlongPunishment:
    __name__: ClassVar[str] = "soft_overlong_punishment_reward"

    max_completion_len: int
    soft_punish_cache: int

    def __post_init__(self) -> None:
        check_number("max_completion_len", self.max_completion_len, integer=True)
        check_number("soft_punish_cache", self.soft_punish_cache, integer=True)
        if self.max_completion_len < 1:
            raise ValueError(f"max_completion_len must be at least 1 token, got {self.max_completion_len}")
        if not 0 <= self.soft_punish_cache <= self.max_completion_len:
            raise ValueError(
                f"soft_punish_cache must be between 0 and max_completion_len ({self.max_completion_len}) tokens, "
                f"got {self.soft_punish_cache}"
            )

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float | None]:
        return [self._value(len(ids)) for ids in completion_ids]

    def _value(self, length: int) -> float:
        free = self.max_completion_len - self.soft_punish_cache
        if length <= free:
            return 0.0
        if length <= self.max_completion_len:
            return (free - length) / self.soft_punish_cache
        return -1.0


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> RewardFunction:
    """Correctness, scaled by length along half a cosine: short right answers earn most, short wrong ones cost most.

    With p = min(tokens / max_len, 1) a right completion gets min + (max - min)(1 + cos(pi p))/2; a wrong one the same
    with its min and max exchanged. Right and wrong are `accuracy_reward`'s, so a gold answer that cannot be parsed
    gives None. Yeo et al. 2025, "Demystifying Long Chain-of-Thought Reasoning in LLMs" (arXiv:2502.03373), C.1.

    Args:
        max_len: Number of tokens at which the schedule ends, at least 1.
        min_value_wrong: Reward of a wrong completion of length 0.
        max_value_wrong: Reward of a wrong completion of `max_len` tokens or more.
        min_value_correct: Reward of a right completion of `max_len` tokens or more.
        max_value_correct: Reward of a right completion of length 0.

    Returns:
        `cosine_scaled_reward(completions, solution, completion_ids, **columns)`.
    """
    return _CosineScaled(max_len, min_value_wrong, max_value_wrong, min_value_correct, max_value_correct)


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> RewardFunction:
    """(1 - unique n-grams / all n-grams) * max_penalty over a completion's token ids; shorter than one n-gram: 0.0.

    Yeo et al. 2025 (arXiv:2502.03373), C.2.

    Args:
        ngram_size: Tokens in an n-gram, at least 1.
        max_penalty: Value that a fully repetitive completion approaches, zero or negative.

    Returns:
        `repetition_penalty_reward(completion_ids, **columns)`.
    """
    return _RepetitionPenalty(ngram_size, max_penalty)


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> RewardFunction:
    """0 up to L - C tokens, falling linearly to -1 at L, and -1 beyond, with L and C the two arguments.

    Yu et al. 2025, "DAPO" (arXiv:2503.14476), equation 13.

    Args:
        max_completion_len: L, in tokens, at least 1.
        soft_punish_cache: C, in tokens, between 0 (no linear part) and L.

    Returns:
        `soft_overlong_punishment_reward(completion_ids, **columns)`.
    """
    return _SoftOverlongPunishment(max_completion_len, soft_punish_cache)
