"""GRPO here and in TRL: the same rows and the same weights, then the loss and every parameter's gradient compared.

One optimizer step of one micro-batch each, float32 on the CPU, a tiny Qwen2. Runs in an environment that has both
(`make peer` makes it) and fails if anything differs by more than 1e-5:

    .venv-peer/bin/python benchmarks/parity/grpo.py
"""

from __future__ import annotations

from functools import partial
from typing import Any

import compare
import trl
from cases import LOSS_TYPES, OPTIONS, REQUIRED, REWARDS, SCALINGS, Option
from page import table_row
from sides import EVEN, RAGGED, Scene, ours, sampler_logps, theirs

import slipstream


def sides(rows: Scene, comparison: compare.Comparison, settings: dict[str, Any], on_policy: bool) -> list[Any]:
    """Functions that lead TRL's and our trainer through the step."""
    return [
        partial(theirs, trl.GRPOTrainer, trl.GRPOConfig, rows, comparison.outputs, settings, on_policy),
        partial(ours, slipstream.GRPOTrainer, slipstream.GRPOConfig, rows, comparison.outputs, settings, on_policy),
    ]


def case(comparison: compare.Comparison, loss_type: str, name: str, option: Option) -> dict[str, Any]:
    """One cell of the table."""
    settings = {"loss_type": loss_type, **REQUIRED.get(loss_type, {}), **option.settings}
    rows = comparison.scene(REWARDS["some not scored"], RAGGED if option.ragged else EVEN, moe=option.moe)
    if option.sampled:
        rows.sampler_logps = sampler_logps(rows, settings.get("temperature", 1.0), option.unknown)
    return comparison.case(loss_type, name, option.base, *sides(rows, comparison, settings, option.on_policy))


def run(comparison: compare.Comparison) -> dict[str, Any]:
    """All cases."""
    losses: dict[str, dict[str, Any]] = {}
    for name, option in OPTIONS.items():
        losses[name] = {kind: case(comparison, kind, name, option) for kind in option.loss_types}
        print(table_row(name, losses[name], LOSS_TYPES), flush=True)
    advantages = {
        name: {
            kind: comparison.advantages(*sides(comparison.scene(rewards), comparison, settings, True))
            for kind, settings in SCALINGS.items()
        }
        for name, rewards in REWARDS.items()
    }
    return {"losses": losses, "advantages": advantages}


if __name__ == "__main__":
    compare.main("grpo", __doc__, run)
