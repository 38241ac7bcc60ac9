"""Write the tables of fields in docs/trainers.md and docs/trainers/ from the configurations.

    .venv/bin/python scripts/trainer_docs.py

Pages hold them between `<!-- fields: RLOOConfig -->` and `<!-- end -->`; the rest of a page is left as it is. A test
fails while a page says something else than its configuration.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (DOCS / "trainers.md", *sorted((DOCS / "trainers").glob("*.md")))
BLOCK = re.compile(r"(<!-- fields: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def default(field: dataclasses.Field[Any]) -> Any:
    """The value that a field has when it is not given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def own_fields(config: type) -> list[dataclasses.Field[Any]]:
    """Fields that the base of a configuration does not have, or has with another default."""
    from transformers import TrainingArguments

    from slipstream.config import OnlineConfig

    base = TrainingArguments if config is OnlineConfig else OnlineConfig
    known = {field.name: default(field) for field in dataclasses.fields(base)}
    return [f for f in dataclasses.fields(config) if f.name not in known or known[f.name] != default(f)]


def table(config: type) -> str:
    """Those fields as a table of Markdown."""
    rows = ["| field | default | |", "|---|---|---|"]
    for field in own_fields(config):
        meaning = field.metadata["help"].replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{default(field)!r}` | {meaning} |")
    return "\n".join(rows)


def written(page: str) -> str:
    """A page with its tables as they have to be."""
    import slipstream
    from slipstream.config import OnlineConfig

    def block(match: re.Match[str]) -> str:
        config = OnlineConfig if match[2] == "OnlineConfig" else getattr(slipstream, match[2])
        return f"{match[1]}{table(config)}\n{match[3]}"

    return BLOCK.sub(block, page)


def main() -> None:
    for path in PAGES:
        path.write_text(written(path.read_text()))


if __name__ == "__main__":
    main()
