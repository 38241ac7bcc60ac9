"""The quickstart in server mode: starts `slipstream vllm-serve`, trains against it, and ends it.

python examples/quickstart/with_server.py [settings of the run, such as --max_steps 20]
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from asyncio.subprocess import Process

CONFIG = "examples/quickstart/grpo.yaml"
SERVER = ["vllm-serve", "--model", "examples/quickstart/model", "--host", "127.0.0.1", "--dtype", "float32",
          "--max-model-len", "32"]  # fmt: skip
END_SECONDS = 60.0  # between SIGTERM and SIGKILL


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def end(process: Process) -> None:
    """End a process that may have ended."""
    if process.returncode is None:
        process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), END_SECONDS)
        if process.returncode is None:
            process.kill()
            await process.wait()


async def main() -> int:
    """Run both; returns the training's exit status, 1 if the server ended before it, or 128 plus a signal's number."""
    told: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    for number in (signal.SIGINT, signal.SIGTERM):  # before anything runs that a signal would leave behind
        asyncio.get_running_loop().add_signal_handler(number, lambda n: told.done() or told.set_result(128 + n), number)

    async def start(*arguments: str) -> Process:
        return await asyncio.create_subprocess_exec(sys.executable, "-m", "slipstream", *arguments)

    port = str(free_port())
    server = await start(*SERVER, "--port", port)
    # The trainer waits for the server to be up, and finds its key where the server left it.
    where = ["--vllm_mode", "server", "--vllm_server_host", "127.0.0.1", "--vllm_server_port", port]
    trainer = await start("grpo", "--config", CONFIG, "--output_dir", "runs/quickstart-server", *where, *sys.argv[1:])
    waits = [told, asyncio.ensure_future(trainer.wait()), asyncio.ensure_future(server.wait())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    status = next((done.result() for done in waits[:2] if done.done()), 1)
    await end(trainer)
    await end(server)
    return status


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
