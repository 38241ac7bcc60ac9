"""The code blocks of the project's pages, fenced and indented, each with the place where it stands."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATTERNS = ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "examples/*/README.md")
FENCE = re.compile(r"^ *(`{3,}|~{3,})\s*(\S*)")


@dataclass(frozen=True)
class Block:
    """A block: its page, the line and the section where it begins, the language of its fence (or ""), its text."""

    page: str
    line: int
    section: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Every page whose blocks are run or checked."""
    return sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern)})


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """The blocks of a page, in order.

    Raises:
        ValueError: a fence is never closed.
    """
    section, lines, at = "", text.splitlines(), 0
    while at < len(lines):
        start, fence = at, FENCE.match(lines[at])
        at += 1
        if fence:
            while at < len(lines) and not lines[at].strip().startswith(fence[1]):
                at += 1
            if at == len(lines):
                raise ValueError(f"{page}:{start + 1}: this fence is never closed.")
            yield Block(page, start + 1, section, fence[2], textwrap.dedent("\n".join(lines[start + 1 : at])))
            at += 1
        elif lines[start].startswith("#"):
            section = lines[start].lstrip("#").strip()
        elif _indented(lines[start]) and (start == 0 or not lines[start - 1].strip()):
            # Empty lines belong to a block when more of it follows.
            while at < len(lines) and (_indented(lines[at]) or not lines[at].strip()):
                at += 1
            yield Block(page, start + 1, section, "", textwrap.dedent("\n".join(lines[start:at])).strip("\n"))


def _indented(line: str) -> bool:
    return line.startswith(("    ", "\t")) and bool(line.strip())
