"""Rewards for a right mathematical answer, compared symbolically by math-verify."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from slipstream.rewards.inputs import check_number, same_length, texts
from slipstream.rewards.marks import rowwise
from slipstream.rewards.math_pool import POOL

LogExtra = Callable[[str, list[Any]], None]

_DECIMAL = r"[+-]?\d{1,40}(?:\.\d{1,40})?"
_NUMBER = rf"(?:{_DECIMAL}|[+-]?\d{{1,40}}/\d{{1,40}}|[+-]?\\[dt]?frac\{{[+-]?\d{{1,40}}\}}\{{\d{{1,40}}\}})"
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{([+-]?\d+)\}\{(\d+)\}")
_BIG_FRACTION = re.compile(r"\\[dt]frac")
_BARE = re.compile(rf"\s*{_DECIMAL}\s*")
_GOLD = re.compile(rf"\s*(?:\$\s*({_NUMBER})\s*\$|\\boxed\{{\s*({_NUMBER})\s*\}}|({_NUMBER}))\s*")
# One box with nothing but a number in it. What may change its meaning (a per cent sign, a stated "final answer"
# elsewhere, a second box) leaves the decision to math-verify.
_BOXED = re.compile(rf"\\boxed\{{\s*({_NUMBER})\s*\}}(?!\s*\$*\s*(?:\\?%|[Pp]ercent|[Pp]ct))")


@rowwise
def accuracy_reward(
    completions: Sequence[Any],
    solution: Sequence[Any] | None = None,
    log_extra: LogExtra | None = None,
    time_limit: float = 5.0,
    **columns: Any,
) -> list[float | None]:
    r"""1.0 where the completion's answer equals the gold one, 0.0 where it does not, None where gold cannot be parsed.

    The answer is the last `\boxed{...}` (several boxes outside mathematics are one set), or else the last mathematics
    after "answer" that is marked as such (`$...$`, `\(...\)`, `\[...\]`); a completion that consists of a number alone
    is its own answer. Values are compared, not strings: `\frac{1}{2}` equals 0.5.

    Args:
        completions: Strings, or lists of messages of which the last assistant message counts.
        solution: Gold answers, one a completion: numbers, or text with LaTeX or plain expressions. None gives None.
        log_extra: Given by the trainer; gets the columns `solution` and `answer_parsed` for the table of completions.
        time_limit: Seconds on a core for one comparison, from any thread. A completion that takes longer gets 0.0 and
            a warning; a gold answer that takes longer counts as one that cannot be parsed.

    Raises:
        ValueError, TypeError: `solution` does not match `completions`.
    """
    same_length(completions, solution=solution)
    return _score(texts(completions), solution, log_extra, time_limit)


@rowwise
def reasoning_accuracy_reward(
    completions: Sequence[Any],
    solution: Sequence[Any] | None = None,
    reasoning_delimiters: Sequence[str] | None = None,
    log_extra: LogExtra | None = None,
    time_limit: float = 5.0,
    **columns: Any,
) -> list[float | None]:
    """`accuracy_reward` of the text after the reasoning; 0.0 where the reasoning does not end.

    Args:
        completions: As in `accuracy_reward`.
        solution: As in `accuracy_reward`.
        reasoning_delimiters: Strings that end the reasoning, default `["</think>"]`. The text after the last occurrence
            of the first of them that occurs is scored.
        log_extra: As in `accuracy_reward`.
        time_limit: As in `accuracy_reward`.
    """
    same_length(completions, solution=solution)
    delimiters = ["</think>"] if reasoning_delimiters is None else reasoning_delimiters
    if isinstance(delimiters, str) or not delimiters or not all(isinstance(d, str) and d for d in delimiters):
        raise ValueError(f"reasoning_delimiters must be a list of non-empty strings, got {delimiters!r}")
    finals = []
    for text in texts(completions):
        found = next((d for d in delimiters if d in text), None)
        finals.append(None if found is None else text.rpartition(found)[2])
    return _score(finals, solution, log_extra, time_limit)


def _score(
    answers: Sequence[str | None], solution: Sequence[Any] | None, log_extra: LogExtra | None, time_limit: float
) -> list[float | None]:
    check_number("time_limit", time_limit)
    if time_limit <= 0:
        raise ValueError(f"time_limit must be more than 0 seconds, got {time_limit}")
    assert solution is not None
    golds = [_gold_text(value) for value in solution]
    # A bare number has no mark that math-verify would take as LaTeX, so it gets one.
    boxed = [f"\\boxed{{{text.strip()}}}" if text and _BARE.fullmatch(text) else text for text in answers]
    pairs = list(zip(golds, boxed, strict=True))
    verdicts: dict[tuple[str | None, str | None], tuple[float | None, str | None]] = {}
    for gold, text in dict.fromkeys(pairs):  # Completions of a group are often the same text.
        quick = _quick(gold, text)
        if quick is not None:
            verdicts[gold, text] = quick
    slow = [(gold, text) for gold, text in dict.fromkeys(pairs) if (gold, text) not in verdicts]
    parses = POOL.gold_parses([gold for gold, _ in slow if gold is not None], time_limit)
    asked: list[tuple[str, str]] = []
    for gold, text in slow:
        assert gold is not None
        assert text is not None
        if not parses[gold]:
            verdicts[gold, text] = (None, None)
        elif not _has_mathematics(text):
            verdicts[gold, text] = (0.0, None)
        else:
            asked.append((gold, text))
    for (gold, text), verdict in zip(asked, POOL.compare(asked, time_limit), strict=True):
        verdicts[gold, text] = (0.0, None) if verdict is None else (float(verdict[0]), verdict[1])
    if log_extra is not None:
        log_extra("solution", list(solution))
        log_extra("answer_parsed", [verdicts[pair][1] or "[none]" for pair in pairs])
    return [verdicts[pair][0] for pair in pairs]


def _gold_text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        bare = _GOLD.fullmatch(value)
        # Outside of marked mathematics, math-verify reads \frac{7}{3} and 5, but neither \dfrac{7}{3} nor +5.
        return _BIG_FRACTION.sub(r"\\frac", bare[3]).removeprefix("+") if bare and bare[3] else value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise TypeError(f"a solution must be a string, a number or None, got {type(value).__name__} {value!r}")


def _quick(gold: str | None, text: str | None) -> tuple[float | None, str | None] | None:
    """The verdict where two plain numbers decide it; None where math-verify has to."""
    if text is None:
        return 0.0, None
    if gold is None:
        return None, None
    expected_match = _GOLD.fullmatch(gold)
    if expected_match is None:
        return None
    expected = next(group for group in expected_match.groups() if group is not None)
    if not _has_mathematics(text):
        return 0.0, None
    only_box = text.count("\\boxed") == 1 and "final answer" not in text.lower()
    found_match = _BOXED.search(text) if only_box else None
    if found_match is None:
        return None
    found = found_match[1]
    right, answer = _rational(expected), _rational(found)
    if right is None or answer is None:
        return None
    if right == answer:
        return 1.0, found
    # Close values may be equal after rounding, which is math-verify's to say.
    return (0.0, found) if abs(right - answer) * 1000 > max(Fraction(1), abs(right)) else None


def _rational(number: str) -> Fraction | None:
    """The value of a string that matches `_NUMBER`, None if its denominator is zero."""
    match = _FRACTION.fullmatch(number)
    if match:
        number = f"{match[2]}/{match[3]}"
    try:
        value = Fraction(number)
    except ZeroDivisionError:
        return None
    return -value if match and match[1] == "-" else value


def _has_mathematics(text: str) -> bool:
    """Whether anything in it could be extracted: a box, a fraction, or delimited mathematics."""
    return any(mark in text for mark in "$\\[")
