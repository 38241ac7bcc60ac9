"""A process that ends while a thread of gloo frees the tensor of its last collective.

Arguments: a file for the rendezvous; "leave" or "end" for the project's two ways to end well, "alone" for neither.
"""

import sys
import threading
import time

import torch
import torch.distributed as dist

from slipstream.lifetime import end_after_gloo, leave_process_group

begun = threading.Event()


# Where nobody waits for the thread, the time that it is kept from a core does not count: it is to meet the end.
clock = time.thread_time if sys.argv[2] == "alone" else time.monotonic


class SlowToFree(torch.Tensor):
    def __del__(self, begun=begun, now=clock):
        begun.set()
        until = now() + 0.5
        while now() < until:
            pass


dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", world_size=1, rank=0)
# Large, so that the thread is the last to hold it.
ones = torch.ones(20_000_000)
dist.all_gather([torch.empty_like(ones)], ones.as_subclass(SlowToFree), async_op=True)
assert begun.wait(30)
if sys.argv[2] == "leave":
    kept = dist.group.WORLD  # as DDP keeps it
    leave_process_group()
elif sys.argv[2] == "end":
    end_after_gloo()
