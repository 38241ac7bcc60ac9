"""The quickstart in server mode: starts `slipstream vllm-serve`, trains against it, and ends it.

python examples/quickstart/with_server.py [settings of the run, such as --max_steps 20]
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

CONFIG = "examples/quickstart/grpo.yaml"
SERVER = ["vllm-serve", "--model", "examples/quickstart/model", "--host", "127.0.0.1", "--dtype", "float32",
          "--max-model-len", "32"]  # fmt: skip


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> int:
    """Run both; returns the training's exit status, or 1 if the server ended before it."""
    slipstream = [sys.executable, "-m", "slipstream"]
    port = str(free_port())
    server = subprocess.Popen([*slipstream, *SERVER, "--port", port])
    # The trainer waits for the server to be up, and finds its key where the server left it.
    where = ["--vllm_mode", "server", "--vllm_server_host", "127.0.0.1", "--vllm_server_port", port]
    trainer = subprocess.Popen(
        [*slipstream, "grpo", "--config", CONFIG, "--output_dir", "runs/quickstart-server", *where, *sys.argv[1:]]
    )
    ended, status = os.waitpid(-1, 0)  # whichever ends first ends the other
    other = trainer if ended == server.pid else server
    other.terminate()
    other.wait(timeout=60)
    return 1 if other is trainer else os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
