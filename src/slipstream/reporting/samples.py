"""The completions a report carries: all of a short run's, an even choice of a long one's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .completions import CompletionRow
from .history import is_number
from .text import shorten, visible

MAX_ROWS = 2000
"""Most completions in one report."""
MAX_CHARS = 4_000_000
"""Most characters of prompts and completions in one report."""
MAX_TEXT = 8000
"""Longest prompt or completion in a report, in characters; longer ones lose their middle."""


def samples(rows: Sequence[CompletionRow]) -> dict[str, Any]:
    """`rows` as plain data for the report's browser.

    Whole steps are kept or left out, evenly over the run, with the first and the last; only where two steps alone are
    too much are they cut short.

    Returns:
        `names`: the reward functions; `prompts`: each prompt once; `rows`: the completions, with `p` the index of the
        prompt and `r` the rewards in the order of `names`; `left_out`: a sentence, or "" if everything is here.
    """
    groups: dict[tuple[int, str], list[CompletionRow]] = {}
    for row in sorted(rows, key=lambda row: row.step):
        groups.setdefault((row.step, row.mode), []).append(row)
    chosen = _choose(list(groups.values()))
    names = list(dict.fromkeys(name for group in chosen for row in group for name in row.rewards))
    prompts: dict[str, int] = {}
    shown = [
        {
            "s": row.step,
            "m": row.mode,
            "p": prompts.setdefault(_shown(row.prompt), len(prompts)),
            "c": _shown(row.completion),
            "r": [_value(row.rewards.get(name)) for name in names],
            "a": _value(row.advantage),
            "l": row.length,
            "t": row.truncated,
            "v": row.weight_version,
        }
        for group in chosen
        for row in group
    ]
    cut = any(len(text) > MAX_TEXT for group in chosen for row in group for text in (row.prompt, row.completion))
    sentences = []
    if len(shown) < len(rows):
        all_steps = len({step for step, _ in groups})
        steps = len({row["s"] for row in shown})
        sentences.append(
            f"This page carries {len(shown):,} of {len(rows):,} completions, from {steps:,} of {all_steps:,} steps "
            f"spread evenly over the run; the run's completion log has the rest."
        )
    if cut:
        sentences.append(f"Texts over {MAX_TEXT:,} characters are shortened in the middle.")
    return {"names": names, "prompts": list(prompts), "rows": shown, "left_out": " ".join(sentences)}


def _shown(text: str) -> str:
    return visible(shorten(text, MAX_TEXT), lines=True)


def _value(value: float | None) -> float | None:
    return round(float(value), 6) if is_number(value) else None


def _size(group: Sequence[CompletionRow]) -> int:
    """Characters of a group: prompts count once, as they are stored once."""
    prompts = {row.prompt for row in group}
    return sum(min(len(text), MAX_TEXT) for text in (*prompts, *(row.completion for row in group)))


def _choose(groups: list[list[CompletionRow]]) -> list[list[CompletionRow]]:
    counts, sizes = [len(group) for group in groups], [_size(group) for group in groups]

    def spread(k: int) -> list[int]:
        return sorted({round(i * (len(groups) - 1) / (k - 1)) for i in range(k)})

    def fits(picked: list[int]) -> bool:
        return sum(counts[i] for i in picked) <= MAX_ROWS and sum(sizes[i] for i in picked) <= MAX_CHARS

    if fits(list(range(len(groups)))):
        return groups
    low, high = 2, len(groups)  # the most steps that fit, by bisection
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(spread(middle)) else (low, middle)
    picked = spread(low) if len(groups) > 1 else [0]
    if fits(picked):
        return [groups[i] for i in picked]
    return [_head(groups[i], MAX_ROWS // len(picked), MAX_CHARS // len(picked)) for i in picked]


def _head(group: list[CompletionRow], most_rows: int, most_chars: int) -> list[CompletionRow]:
    kept = group[:most_rows]
    while len(kept) > 1 and _size(kept) > most_chars:
        kept = kept[: len(kept) // 2]
    return kept
