"""A replica of a server: one engine behind a Unix socket, as a process of its own.

    python -m slipstream.serving.replica --socket PATH     its settings, `ReplicaSettings` as JSON, on standard input

The socket is there once the replica serves; `replica_app` has its routes.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from typing import Any

import msgspec

from slipstream.lifetime import die_with_parent
from slipstream.serving import wire

EXTENSION = "slipstream.serving.worker.Extension"
_GRACE_SECONDS = 1  # between SIGTERM and the end of answers that are being sent
_KEEP_ALIVE_SECONDS = 120  # longer than clients keep connections


class ReplicaSettings(wire.Message):
    """What a replica is started with.

    Attributes:
        engine: Options of vLLM's engine, by its names; `model` is among them.
        reference: Whether the engine has a reference model beside the policy.
        log_level: debug, info, warning, error or critical.
        parent: Process id of the server, whose end is this process's end.
    """

    engine: dict[str, Any]
    reference: bool = False
    log_level: str = "info"
    parent: int | None = None


def prepare_environment(log_level: str) -> None:
    """Set what torch and vLLM read from the environment when they are imported. What is there is kept."""
    values = {
        "OMP_WAIT_POLICY": "passive",  # threads that spin take the cores from each other
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # replicas would all be bound to the same cores
    }
    if log_level not in ("info", "warning"):  # of which vLLM has too much to say
        values["VLLM_LOGGING_LEVEL"] = log_level.upper()
    for name, value in values.items():
        os.environ.setdefault(name, value)


def start_engine(options: dict[str, Any], reference: bool = False) -> Any:
    """vLLM's asynchronous engine for `ReplicaSettings.engine` and `reference`."""
    from slipstream.generation.vllm_options import ENGINE_FIELDS, engine_options
    from slipstream.vllm_compat import async_engine, on_cpu

    if on_cpu() and not options.get("enforce_eager"):
        options.pop("enforce_eager", None)  # compiling a model for the CPU takes minutes
    fields = {name: value for name, value in options.items() if name in ENGINE_FIELDS}
    extra = {name: value for name, value in options.items() if name not in ENGINE_FIELDS}
    if "worker_extension_cls" in extra:
        raise ValueError("worker_extension_cls: the server's own class takes this place; leave it out")
    # Prompts are processed once for all of their samples; a weight update meanwhile would empty the cache that they are
    # then looked up in.
    extra.setdefault("mm_processor_cache_gb", 0)
    chosen = engine_options(fields, extra, reference=reference, source="engine options")
    return async_engine.start({**chosen, "worker_extension_cls": EXTENSION})


def main() -> None:
    """Run a replica."""
    parser = argparse.ArgumentParser(prog="slipstream.serving.replica", description=__doc__)
    parser.add_argument("--socket", required=True)
    socket = parser.parse_args().socket
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=ReplicaSettings)
    die_with_parent(settings.parent)
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each question to the rendezvous store
    warnings.simplefilter("ignore", FutureWarning)  # vLLM's imports have a few, for its authors
    prepare_environment(settings.log_level)

    import uvicorn

    from slipstream.serving.replica_app import Replica

    app = Replica(start_engine(settings.engine, settings.reference), settings.reference).app()
    uvicorn.run(
        app, uds=socket, log_level="warning", access_log=False, lifespan="on", ws="none",
        timeout_graceful_shutdown=_GRACE_SECONDS, timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    # A process of vLLM's begins with this module: here it is not yet busy for seconds with importing what it runs. Who
    # was too late even here finds out when it has done so (`async_engine`, `worker`).
    die_with_parent()
