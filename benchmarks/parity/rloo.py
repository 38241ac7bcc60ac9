"""RLOO here and in TRL, compared as `grpo.py` compares GRPO.

.venv-peer/bin/python benchmarks/parity/rloo.py
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import compare
import trl
from cases import REWARDS, Option
from page import RLOO_COLUMNS, table_row
from sides import EVEN, RAGGED, Result, Scene, ours, theirs

import slipstream

PLAIN = "as it is"
CLIPPED = {"reward_clip_range": (-0.5, 1.0)}
OPTIONS: dict[str, Option] = {
    PLAIN: Option({"beta": 0.0}, base=None),
    "prompts of different lengths": Option({"beta": 0.0}, ragged=True, base=PLAIN),
    "beta": Option({"beta": 0.5}, base=PLAIN),
    "reward_clip_range": Option({"beta": 0.0, **CLIPPED}, base=PLAIN),
    "beta, reward_clip_range": Option({"beta": 0.5, **CLIPPED}, base="beta"),
    "normalize_advantages": Option({"beta": 0.0, "normalize_advantages": True}, base=PLAIN),
    "temperature 0.7": Option({"beta": 0.0, "temperature": 0.7}, base=PLAIN),
    "mask_truncated_completions": Option({"beta": 0.0, "mask_truncated_completions": True}, base=PLAIN),
    "mask_truncated_completions, beta": Option({"beta": 0.5, "mask_truncated_completions": True}, base="beta"),
    "router_aux_loss_coef": Option({"beta": 0.0, "router_aux_loss_coef": 0.1}, moe=True, base=None),
    "everything": Option(
        {"beta": 0.5, "mask_truncated_completions": True, "normalize_advantages": True, **CLIPPED},
        base=PLAIN,
    ),
}  # fmt: skip
# Wider bounds of the ratio, which is 1 on-policy.
CLIPS: dict[str, Option] = {
    "epsilon 0.9": Option({"beta": 0.0, "epsilon": 0.9}, base=PLAIN),
    "epsilon_high 30.0": Option({"beta": 0.0, "epsilon_high": 30.0}, base=PLAIN),
}
ADVANTAGES: dict[str, dict[str, Any]] = {
    "leave one out": {"beta": 0.0},
    "normalize_advantages": {"beta": 0.0, "normalize_advantages": True},
    "beta": {"beta": 0.5},
    "reward_clip_range": {"beta": 0.0, **CLIPPED},
}


def sides(rows: Scene, comparison: compare.Comparison, settings: dict[str, Any], on_policy: bool) -> list[Any]:
    """Functions that lead TRL's and our trainer through the step."""

    def mine() -> Result:
        found = ours(slipstream.RLOOTrainer, slipstream.RLOOConfig, rows, comparison.outputs, settings, on_policy)
        # On-policy our KL penalty comes in with the training step: advantages made before it are without.
        return replace(found, advantages=None) if on_policy and settings["beta"] else found

    return [partial(theirs, trl.RLOOTrainer, trl.RLOOConfig, rows, comparison.outputs, settings, on_policy), mine]


def case(comparison: compare.Comparison, column: str, name: str, option: Option) -> dict[str, Any]:
    """One cell of the table."""
    rows = comparison.scene(REWARDS["some not scored"], RAGGED if option.ragged else EVEN, moe=option.moe)
    pair = sides(rows, comparison, option.settings, column == "on-policy")
    return comparison.case(column, name, option.base, *pair)


def run(comparison: compare.Comparison) -> dict[str, Any]:
    """All cases."""
    losses: dict[str, dict[str, Any]] = {}
    for name, option in (OPTIONS | CLIPS).items():
        columns = RLOO_COLUMNS[:1] if name in CLIPS else RLOO_COLUMNS
        losses[name] = {column: case(comparison, column, name, option) for column in columns}
        print(table_row(name, losses[name], RLOO_COLUMNS), flush=True)
    advantages = {
        name: {
            kind: comparison.advantages(*sides(comparison.scene(rewards), comparison, settings, False))
            for kind, settings in ADVANTAGES.items()
        }
        for name, rewards in REWARDS.items()
    }
    return {"losses": losses, "advantages": advantages}


if __name__ == "__main__":
    compare.main("rloo", __doc__, run)
