"""One rank of a run whose budget of tokens is measured by a made-up meter; a script for `torch.distributed.run`."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

import resumable
import torch

from slipstream.lifetime import leave_process_group
from slipstream.modeling import budget
from slipstream.trainers import learning


class Meter:
    """Each rank's memory is another: that of rank 1 holds half as much."""

    def __init__(self, rank):
        self.rank, self.measured = rank, 0

    def free(self):
        return 12500 // (1 + self.rank)

    def peak(self, step):
        step()
        self.measured += 1
        return 10_000 * self.measured


def main() -> None:
    """Arguments: the model, the output folder, and arguments of `make` as JSON."""
    model, folder, settings = sys.argv[1:]
    budget.MULTIPLE, learning.optimizer_promise = 1, lambda *_: 0
    trainer = resumable.make(model, folder, **json.loads(settings))
    meter = Meter(trainer.args.process_index)
    trainer._find_budget = functools.partial(trainer._find_budget, meter=meter)
    agree, asked = trainer._most_of_all_ranks, []
    trainer._most_of_all_ranks = lambda number: asked.append(number) or agree(number)
    trainer.train()
    values = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    told = {
        "max_tokens": trainer.packer.max_tokens,
        "measured": meter.measured,
        "asked": asked[:3],
        "sum": values.double().sum().item(),
    }
    Path(folder, f"rank{meter.rank}.json").write_text(json.dumps(told))
    trainer.close()


if __name__ == "__main__":
    main()
    leave_process_group()
