"""Text for screens: model output made harmless, long text shortened, numbers and durations written for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

# A model can write anything. Escape sequences could move the cursor or retitle a terminal, direction overrides could
# make text read as what it is not, and a lone surrogate cannot be encoded at all: each gets a visible stand-in.
_HIDDEN = [*range(0x80, 0xA0), 0x061C, 0x200B, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF]
_STAND_INS: dict[int, str] = {code: chr(0x2400 + code) for code in range(0x20)}
_STAND_INS |= {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _HIDDEN}
_STAND_INS |= {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}
_STAND_INS |= {0x0A: "↵", 0x09: "⇥", 0x7F: "␡"}


_STAND_INS_BUT_LINES = {code: shown for code, shown in _STAND_INS.items() if code not in (0x09, 0x0A)}


def visible(text: str, *, lines: bool = False) -> str:
    """`text` without a character that a screen acts on: escape becomes `␛`, a newline `↵`, a tab `⇥`.

    Args:
        text: Any text.
        lines: Leave newlines and tabs as they are.
    """
    return text.translate(_STAND_INS_BUT_LINES if lines else _STAND_INS)


def shorten(text: str, limit: int) -> str:
    """`text` in at most `limit` characters, cut in the middle: questions end prompts, answers end completions."""
    if len(text) <= limit:
        return text
    mark = " … "
    kept = max(limit - len(mark), 2)
    tail = kept // 2
    return text[: kept - tail] + mark + text[-tail:]


def transcript(messages: Sequence[dict[str, Any]]) -> str:
    """The messages of a completion: what the model wrote, `→` what it called, and `←` what it was told."""
    lines = []
    for message in messages:
        if message["role"] == "tool":
            lines.append(f"← {message['name']}: {message['content']}")
            continue
        if message["content"] or not message.get("tool_calls"):
            lines.append(str(message["content"]))
        for call in message.get("tool_calls", ()):
            function = call["function"]
            lines.append(f"→ {function['name']}({json.dumps(function['arguments'], ensure_ascii=False)})")
    return "\n".join(lines)


def number(value: float | None) -> str:
    """A number for a table or a tile: `1,234`, `0.314`, `1.2M`, `2.1e-05`; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    # Three digits of 999.7 are 1e+03: where rounding reaches the next unit, it is written in that.
    if size >= 999_999.5:
        power, letter = (9, "B") if size >= 999.5e6 else (6, "M")
        return f"{value / 10**power:.3g}{letter}" if size < 999.5e9 else f"{value:.3g}"
    if size >= 999.5 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """Seconds for people: `8.4 s`, `142 s`, `12 min 05 s`, `3 h 20 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 600:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def clock(seconds: float | None) -> str:
    """Seconds as `h:mm:ss`, or `-:--:--` when unknown."""
    if seconds is None:
        return "-:--:--"
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
