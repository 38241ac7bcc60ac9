"""How processes end: with the one that started them, however that one ends; and apart from those of their run."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

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
    """End torch.distributed's default process group, if there is one, before the interpreter ends.

    Else gloo's threads are connected then, and at times abort it: a run that failed, to all appearances.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
