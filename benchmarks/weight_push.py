"""Pushing a model's weights to a server that generates, beside a plain broadcast of the same bytes between the same
two devices, and beside TRL's push to a `vllm serve`.

    python benchmarks/weight_push.py --shape qwen2-7b qwen2-1.5b --peer --out benchmarks/results/weight_push_h100.json
    python benchmarks/weight_push.py --shape tiny                                                    # a CPU, with gloo

The first needs two GPUs: the trainer's side is device 0, that of the servers, which all start at once, device 1.
Weights are random. Pushes are measured to a server that has nothing to do, then to one that has requests to answer;
`paused` is how long it could not go on with them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compiles kernels on its first use, which needs a compiler.
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import shapes
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from meeting import free_port
from serving.servers import Server, start_server
from transformers import AutoModelForCausalLM, PretrainedConfig

from slipstream.serving.client import VLLMClient

CHUNK = 1 << 30  # bytes of one plain broadcast
GAP_SECONDS = 1.0
# Several engines share a GPU: each is told its cache's size, since what vLLM measures would count the others.
ROOM = ("--gpu-memory-utilization", "0.15", "--kv-cache-memory-bytes", str(1 << 30))


def make_model(config: PretrainedConfig, device: str) -> torch.nn.Module:
    """Random weights."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def start_ours(folder: Path, on_gpu: bool) -> Server:
    """A `slipstream vllm-serve` of a model without weights."""
    environment, options = {}, ["--load-format", "dummy", "--dtype", "bfloat16", "--enforce-eager"]
    if on_gpu:
        environment = {"CUDA_VISIBLE_DEVICES": "1"}
        options += ["--max-model-len", "2048", *ROOM]
    # The log level tells where a push's time goes.
    return start_server(folder, *options, "--log-level", "debug", env=environment, timeout=300)


def pushes(config: PretrainedConfig, url: str, key: str, device: str, repeats: int) -> dict[str, Any]:
    """Updates of a server's weights; the first one makes the connection and the plan."""
    weights = [(name, parameter.detach()) for name, parameter in make_model(config, device).named_parameters()]
    logging.basicConfig(format="%(message)s")
    logging.getLogger("slipstream.serving.sender").setLevel(logging.DEBUG)
    with VLLMClient(base_url=url, api_key=key) as client:
        client.init_communicator(0 if device != "cpu" else "cpu", "group")
        idle = [client.update_weights(version, weights) for version in range(1, repeats + 2)]
        busy = []
        with requests_at(url, key) as answered:
            for version in range(repeats + 2, 2 * repeats + 2):
                # As between two training steps. Right after an update the server computes what it has of its
                # completions again, with the new weights, and a call waits for the end of such a step.
                time.sleep(GAP_SECONDS)
                busy.append(client.update_weights(version, weights))
        client.close_communicator()
    return {
        "bytes": idle[0].nbytes, "tensors": idle[0].tensors, "first_seconds": idle[0].seconds,
        "seconds": [r.seconds for r in idle[1:]], "busy_seconds": [r.seconds for r in busy],
        "paused": [r.paused for r in busy], "completions_meanwhile": sum(answered),
    }  # fmt: skip


@contextmanager
def requests_at(url: str, key: str) -> Iterator[list[int]]:
    """Keep a server busy: 32 completions of 200 tokens, and again when they are there."""
    leave, running, answered = threading.Event(), threading.Event(), []
    prompts = [[10 + i, 20, 30] for i in range(32)]

    def ask() -> None:
        with VLLMClient(base_url=url, api_key=key) as client:
            while not leave.is_set():
                running.set()
                answer = client.generate(prompts, max_tokens=200, generation_kwargs={"ignore_eos": True})
                answered.append(len(answer["completion_ids"]))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        if not running.wait(60):
            raise TimeoutError("no request within 60 seconds")
        yield answered
    finally:
        leave.set()
        thread.join(300)


def plain(rank: int, device: str, size: int, repeats: int, rendezvous: str, answers: Any) -> None:
    """One of two processes that broadcast `size` bytes, as fast as the backend can."""
    backend, place = ("gloo", "cpu") if device == "cpu" else ("nccl", f"cuda:{rank}")
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    chunk = torch.zeros(min(CHUNK, size), dtype=torch.uint8, device=place)
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        for start in range(0, size, CHUNK):
            dist.broadcast(chunk[: min(CHUNK, size - start)], src=0)
        chunk[:1].cpu()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    if rank == 0:
        answers.put(seconds[1:])
    dist.destroy_process_group()


def broadcasts(device: str, size: int, repeats: int, folder: str) -> list[float]:
    """Seconds of plain broadcasts of `size` bytes."""
    context = mp.get_context("spawn")
    answers = context.Queue()
    arguments = (device, size, repeats, f"{folder}/meet", answers)
    members = [context.Process(target=plain, args=(rank, *arguments)) for rank in range(2)]
    for member in members:
        member.start()
    seconds = answers.get(timeout=300)
    for member in members:
        member.join(60)
    return seconds


def trl_pushes(config: PretrainedConfig, url: str, repeats: int) -> dict[str, Any]:
    """TRL's client pushes the same weights to a `vllm serve`, as its trainer does after each step."""
    from trl.generation.vllm_client import VLLMClient as TRLClient

    model = make_model(config, "cuda:0")
    client = TRLClient(base_url=url, group_port=free_port(), connection_timeout=240)
    client.init_communicator(0)
    seconds = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        client.update_model_params(model)
        client.reset_prefix_cache()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    client.close_communicator()
    return {"first_seconds": seconds[0], "seconds": seconds[1:], "trl": metadata.version("trl")}


class Peer:
    """The `vllm serve` that TRL's documentation starts, of a model without weights."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--host", "127.0.0.1",
            "--port", str(port), "--weight-transfer-config", '{"backend": "nccl"}',
            "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--max-model-len", "2048",
            "--load-format", "dummy", "--dtype", "bfloat16", "--enforce-eager", *ROOM,
        ]  # fmt: skip
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "1", "VLLM_SERVER_DEV_MODE": "1"}
        os.environ["VLLM_HOST_IP"] = "127.0.0.1"  # where TRL's side of the process group listens
        self.url, self.log = f"http://127.0.0.1:{port}", Path(f"{folder}.log")
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers."""
        wait_for(f"{self.url}/health", self.process, 240)

    def stop(self) -> None:
        """End it with all its processes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


def wait_for(url: str, server: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait until `url` answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise TimeoutError(f"{url} did not answer")


class Apart:
    """Calls functions in one other process, whose memory is given back when it ends."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self._calls, self._answers = context.Queue(), context.Queue()
        self._process = context.Process(target=_answer, args=(self._calls, self._answers))
        self._process.start()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function` returns, or, as text, what it raised."""
        self._calls.put((function, arguments))
        return self._answers.get(timeout=300)

    def end(self) -> None:
        """No more calls."""
        self._calls.put(None)
        self._process.join(20)
        self._process.kill()


def _answer(calls: Any, answers: Any) -> None:
    while (call := calls.get()) is not None:
        function, arguments = call
        try:
            answers.put(function(*arguments))
        except Exception as error:  # noqa: BLE001 - reported: what else was measured counts all the same
            traceback.print_exc()
            answers.put(f"{type(error).__name__}: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, nargs="+", default=["tiny"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="measure TRL's push as well; needs TRL and two GPUs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda:0" if torch.cuda.device_count() > 1 else "cpu"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0) if device != "cpu" else f"{platform.machine()} CPU",
        "versions": {p: metadata.version(p) for p in ("torch", "transformers")}, "shapes": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name, ExitStack() as leaving:
        folders = {shape: Path(name, shape) for shape in args.shape}
        configs = {shape: shapes.save_config(shape, folder) for shape, folder in folders.items()}
        peers = {shape: Peer(folder) for shape, folder in folders.items()} if args.peer else {}
        for peer in peers.values():
            leaving.callback(peer.stop)
        apart = Apart()
        leaving.callback(apart.end)
        with ThreadPoolExecutor() as starting:
            started = starting.map(lambda folder: start_ours(folder, device != "cpu"), folders.values())
            servers = dict(zip(folders, started, strict=True))
        for server in servers.values():
            leaving.callback(server.stop)
        print("the servers are there", flush=True)

        def write() -> None:
            if args.out:
                args.out.write_text(json.dumps(result, indent=2) + "\n")

        for shape, server in servers.items():
            pushed = apart(pushes, configs[shape], server.url, server.key, device, args.repeats)
            print(*[line for line in server.output().splitlines() if " weights: " in line][-12:], sep="\n")
            if isinstance(pushed, str):
                sys.exit(f"{shape}: {pushed}")
            broadcast = broadcasts(device, pushed["bytes"], args.repeats, name)
            best, floor = min(pushed["seconds"]), min(broadcast)
            result["shapes"][shape] = {
                "push": pushed, "broadcast_seconds": broadcast, "ratio": best / floor,
                "gb_per_second": {"push": pushed["bytes"] / best / 1e9, "broadcast": pushed["bytes"] / floor / 1e9},
            }  # fmt: skip
            write()
            report(shape, result["device"], result["shapes"][shape])
        for shape, peer in peers.items():
            peer.wait()
            theirs = apart(trl_pushes, configs[shape], peer.url, args.repeats)
            if isinstance(theirs, str):
                theirs = {"error": theirs, "log": peer.log.read_text(errors="replace")[-3000:]}
                print(f"TRL, {shape}: {theirs['error']}", flush=True)
            else:
                ratio = min(theirs["seconds"]) / min(result["shapes"][shape]["push"]["seconds"])
                print(f"{shape}: TRL's push {min(theirs['seconds']):.3f} s, {ratio:.1f} times ours", flush=True)
            result["shapes"][shape]["trl"] = theirs
            write()


def report(shape: str, device: str, result: dict[str, Any]) -> None:
    """For people."""
    pushed, rates = result["push"], result["gb_per_second"]
    print(f"{shape}: {pushed['bytes'] / 1e9:.2f} GB in {pushed['tensors']} tensors on {device}")
    paused = ", ".join(f"{seconds:.3f}" for seconds in pushed["paused"])
    busy = ", ".join(f"{seconds:.3f}" for seconds in pushed["busy_seconds"])
    print(f"  push        {min(pushed['seconds']):8.3f} s  {rates['push']:7.1f} GB/s")
    print(f"  beside generation {busy} s, which was paused for {paused} s")
    print(f"  broadcast   {min(result['broadcast_seconds']):8.3f} s  {rates['broadcast']:7.1f} GB/s")
    print(f"  ratio {result['ratio']:.2f}; the first push took {pushed['first_seconds']:.2f} s", flush=True)


if __name__ == "__main__":
    main()
