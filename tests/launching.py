"""Starting a script on several CPU ranks."""

from __future__ import annotations

import os
import sys
from typing import Any


def torchrun(script: Any, *arguments: Any, ranks: int = 2, **environment: str) -> dict[str, Any]:
    """Arguments of `subprocess.run` and `Popen`: command, and environment with the further variables that are given.

    torchrun, since accelerate starts several CPU processes only through MPI; --standalone takes a free port.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, script]
    settings = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "ACCELERATE_USE_CPU": "true"}
    return {"args": [str(word) for word in (*command, *arguments)], "env": os.environ | settings | environment}
