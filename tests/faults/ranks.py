"""One of two ranks of a trainer that have trouble with a server: `python ranks.py RANK FILE`.

Prints what this rank returns or raises in each case. A rank that waits for the other one does so for 60 s.
"""

from __future__ import annotations

import contextlib
import os
import sys
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import Accelerator

from slipstream.generation.engine import EngineLostError
from slipstream.generation.server import ServerEngine
from slipstream.lifetime import leave_process_group
from slipstream.serving.client import ServerError
from slipstream.trainers.generating import Generating


def tell(case, action):
    try:
        result = action()
    except Exception as error:  # noqa: BLE001
        result = f"{type(error).__name__}: {error}"
    print(f"{case}: {result}", flush=True)


class Exported:
    """Tensors of a model, of which the second cannot be exported."""

    def __iter__(self):
        yield "a", torch.zeros(2)
        raise NotImplementedError("cannot be exported")


class Sampling(Generating):
    """Loses its engine in the first call if it is `unlucky`; the engine comes back unless it is `absent`."""

    def __init__(self, unlucky, absent):
        self.accelerator = Accelerator(cpu=True)
        self.clock = SimpleNamespace(phase=lambda name: contextlib.nullcontext())
        self.engine = SimpleNamespace(recover=self.come_back)
        self.unlucky, self.absent, self.calls = unlucky, absent, 0

    def _engine_ready(self):
        return contextlib.nullcontext()

    def ask_engine(self, requests, sampling, on_finished=None):
        self.calls += 1
        if self.unlucky and self.calls == 1:
            raise EngineLostError("no answer")
        return f"answer {self.calls}"

    def come_back(self):
        if self.absent:
            raise ConnectionError("there is no server")


def main(rank, file):
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in environment.items()}, ACCELERATE_USE_CPU="true")
    dist.init_process_group("gloo", f"file://{file}", timedelta(seconds=60), world_size=2, rank=rank)
    engine = object.__new__(ServerEngine)  # without a server: only how ranks agree is of interest
    engine.version, engine._dtype, engine._specs = None, "float32", None
    errors = {
        "full": ServerError(507, "no memory"), "bug": KeyError("tensor"), "lost": EngineLostError("the server is gone"),
    }  # fmt: skip
    for case, error in errors.items():

        def send(*arguments, error=error):
            raise error

        engine._send = send
        tell(case, lambda: engine.update_weights(1, [("a", torch.zeros(2))]))
    engine._send = lambda version, tensors, reference: list(tensors)
    tell("export", lambda: engine.update_weights(1, Exported()))
    tell("one is unlucky", lambda: Sampling(rank == 1, False)._answers([], None))
    tell("and stays alone", lambda: Sampling(rank == 1, rank == 1)._answers([], None))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    leave_process_group()
