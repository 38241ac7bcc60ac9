"""Starting a script on several CPU ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


def torchrun(script: Any, *arguments: Any, ranks: int = 2, **environment: str) -> dict[str, Any]:
    """Arguments of `subprocess.run` and `Popen`: command, and environment with the further variables that are given.

    torchrun, since accelerate starts several CPU processes only through MPI; --standalone takes a free port.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, script]
    settings = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "ACCELERATE_USE_CPU": "true"}
    return {"args": [str(word) for word in (*command, *arguments)], "env": os.environ | settings | environment}


def start(script: Any, *arguments: Any, ranks: int = 2, **environment: str) -> subprocess.Popen[str]:
    """Begin what `torchrun` describes; `finish` waits for it."""
    started = torchrun(script, *arguments, ranks=ranks, **environment)
    return subprocess.Popen(**started, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*runs: subprocess.Popen[str]) -> None:
    """Wait until all have succeeded. When one fails, the others end, too."""
    try:
        for run in runs:
            output = run.communicate(timeout=1200)[0]
            assert run.returncode == 0, output[-6000:]
    finally:
        for run in runs:
            run.kill()


def found_first(folder: Any) -> str:
    """A PYTHONPATH on which a folder comes before what the environment has."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
