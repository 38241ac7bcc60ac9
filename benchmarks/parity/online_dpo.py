"""Online DPO here and in TRL, compared as `grpo.py` compares GRPO.

.venv-peer/bin/python benchmarks/parity/online_dpo.py
"""

from __future__ import annotations

from functools import partial
from typing import Any

import compare
from cases import REWARDS, Option
from page import ONLINE_DPO_COLUMNS, table_row
from sides import our_pairs, their_pairs

# Six prompts of one length, and of different ones.
EVEN = ("a=1, b=?", "What is?", "The rest", "One, two", "3+4 is =", "Who is a")
RAGGED = ("a=1, b=?", "What?", "The rest of it", "One", "3+4 is = ?", "Who")
PLAIN = "as it is"
OPTIONS: dict[str, Option] = {
    PLAIN: Option(base=None),
    "prompts of different lengths": Option(ragged=True, base=PLAIN),
    "beta 0.5": Option({"beta": 0.5}, base=PLAIN),
    "beta [0.3, 0.1]": Option({"beta": [0.3, 0.1]}, base=PLAIN),
    # Completions are scored at temperature 1, whatever they were sampled at.
    "temperature 0.7": Option({"temperature": 0.7}, base=None),
    "missing_eos_penalty": Option({"missing_eos_penalty": 3.0}, base=PLAIN),
    "everything": Option({"beta": 0.5, "missing_eos_penalty": 3.0}, ragged=True, base=PLAIN),
}
# Also a pair of equal scores: its first completion is chosen.
TIED = [list(column) for column in REWARDS["all scored"]]
TIED[0][1], TIED[1][1] = TIED[0][0], TIED[1][0]


def case(comparison: compare.Comparison, loss_type: str, name: str, option: Option) -> dict[str, Any]:
    """One cell of the table."""
    rows = comparison.scene(TIED, RAGGED if option.ragged else EVEN, group=2, moe=option.moe)
    settings = {"loss_type": loss_type, **option.settings}
    pair = [partial(side, rows, comparison.outputs, settings) for side in (their_pairs, our_pairs)]
    return comparison.case(loss_type, name, option.base, *pair)


def run(comparison: compare.Comparison) -> dict[str, Any]:
    """All cases."""
    losses: dict[str, dict[str, Any]] = {}
    for name, option in OPTIONS.items():
        losses[name] = {kind: case(comparison, kind, name, option) for kind in ONLINE_DPO_COLUMNS}
        print(table_row(name, losses[name], ONLINE_DPO_COLUMNS), flush=True)
    return {"losses": losses}


if __name__ == "__main__":
    compare.main("online_dpo", __doc__, run)
