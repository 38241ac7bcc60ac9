"""How processes end: with the one that started them, however that one ends; and apart from those of their run."""

from __future__ import annotations

import atexit
import ctypes
import logging
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

logger = logging.getLogger(__name__)

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the thread that started it ends, be it by SIGKILL.

    Args:
        parent: Process id of the starter: this process exits at once if it is gone already. None: the one that
            `multiprocessing` knows of, if it has spawned this process.

    Raises:
        OSError: The kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    started_by = multiprocessing.parent_process()
    if parent is None and started_by is not None:
        parent = started_by.pid
    if parent is not None and os.getppid() != parent:
        raise SystemExit(f"the process that started this one ({parent}) is gone")


def leave_process_group() -> None:
    """End torch.distributed's default process group, if there is one, and this process only after gloo."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    end_after_gloo()


def end_after_gloo() -> None:
    """Have this process wait for gloo's threads when it ends; said again, it waits once."""
    atexit.unregister(_let_gloo_rest)
    atexit.register(_let_gloo_rest)


def _let_gloo_rest(deadline: float = 10.0) -> None:
    """Wait until gloo's threads are done with their last collectives, for at most `deadline` seconds.

    Such a thread frees a collective's tensors after the one that waited for it has gone on, and needs the interpreter
    for that. Where the interpreter ends first, the thread aborts the process: a run that failed, to all appearances.
    Ending the process group is not enough, since DDP and FSDP keep it and its threads.
    """
    pause, until = threading.Event(), time.monotonic() + deadline
    before: set[str] = set()
    while (now := _threads_of_gloo()) and not (now == before and all("(sleeping)" in thread for thread in now)):
        if time.monotonic() > until:
            logger.warning("gloo's threads are still busy after %g s: the process ends regardless", deadline)
            return
        before = now
        # The interpreter is free meanwhile: a thread that waits for it, and so sleeps, has its count of switches grow.
        pause.wait(0.02)


def _threads_of_gloo() -> set[str]:
    """What the kernel tells of each: its state, and how often it gave up the CPU. Empty where no kernel does."""
    found = set()
    for task in Path("/proc/self/task").glob("*"):
        try:
            lines = (task / "status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
            continue
        if lines[0].startswith("Name:\tpt_gloo"):
            found.add(" ".join(line for line in lines if line.startswith(("Pid:", "State:")) or "ctxt" in line))
    return found
