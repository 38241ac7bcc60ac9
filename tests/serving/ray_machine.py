"""One machine of a Ray cluster at 127.0.0.1, with one GPU that is none: `python ray_machine.py ADDRESS FOLDER`.

It prints the cluster's address, and ends with its standard input. Without an address it begins a cluster.
"""

from __future__ import annotations

import sys

from ray._private.node import Node
from ray._private.parameter import RayParams


def main(address: str, folder: str) -> None:
    options = RayParams(
        gcs_address=address or None, node_ip_address="127.0.0.1", num_cpus=1, num_gpus=1, temp_dir=folder,
        object_store_memory=80 << 20, include_dashboard=False, include_log_monitor=False, no_monitor=True,
        min_worker_port=0, max_worker_port=0, node_manager_port=0, dashboard_agent_listen_port=None,
    )  # fmt: skip
    node = Node(options, head=not address, shutdown_at_exit=True, spawn_reaper=False)
    print(node.gcs_address, flush=True)
    sys.stdin.read()
    node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
