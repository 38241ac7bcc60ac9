"""Pushing a model's weights to a server that generates, beside a plain broadcast of the same bytes between the same
two devices, and beside TRL's push to a `vllm serve`.

    python benchmarks/weight_push.py --shape qwen2-7b --peer --out benchmarks/results/weight_push_h200_7b.json  # 2 GPUs
    python benchmarks/weight_push.py --shape tiny                                                    # a CPU, with gloo

The trainer's side is device 0, the server's device 1; weights are random. While weights are pushed the server has
requests to answer; `paused` is how long it could not go on with them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
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
from serving.servers import start_server
from transformers import AutoModelForCausalLM, PretrainedConfig

from slipstream.serving.client import VLLMClient

CHUNK = 1 << 30  # bytes of one plain broadcast
TRL_PORT = 51216
GAP_SECONDS = 1.0


def make_model(config: PretrainedConfig, device: str) -> torch.nn.Module:
    """Random weights."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def pushes(config: PretrainedConfig, folder: Path, device: str, repeats: int) -> dict[str, Any]:
    """Updates of a server's weights; the first one makes the connection and the plan."""
    weights = [(name, parameter.detach()) for name, parameter in make_model(config, device).named_parameters()]
    environment, options = {}, ["--load-format", "dummy", "--dtype", "bfloat16", "--enforce-eager"]
    if device != "cpu":
        environment = {"CUDA_VISIBLE_DEVICES": "1"}
        options += ["--gpu-memory-utilization", "0.5", "--max-model-len", "2048"]
    options += ["--log-level", "debug"]  # where a push's time goes
    logging.basicConfig(format="%(message)s")
    logging.getLogger("slipstream.serving.sender").setLevel(logging.DEBUG)
    server = start_server(folder, *options, env=environment, timeout=300)
    try:
        with VLLMClient(base_url=server.url, api_key=server.key) as client:
            client.init_communicator(0 if device != "cpu" else "cpu", "group")
            idle = [client.update_weights(version, weights) for version in range(1, repeats + 2)]
            busy = []
            with requests_at(server.url, server.key) as answered:
                for version in range(repeats + 2, 2 * repeats + 2):
                    # As between two training steps. Right after an update the server computes what it has of its
                    # completions again, with the new weights, and a call waits for the end of such a step.
                    time.sleep(GAP_SECONDS)
                    busy.append(client.update_weights(version, weights))
        print(*[line for line in server.output().splitlines() if " weights: " in line][-12:], sep="\n")
    finally:
        server.stop()
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


def trl_pushes(config: PretrainedConfig, url: str, repeats: int, answers: Any) -> None:
    """TRL's client pushes the same weights to a `vllm serve`, as its trainer does after each step."""
    from trl.generation.vllm_client import VLLMClient as TRLClient

    model = make_model(config, "cuda:0")
    client = TRLClient(base_url=url, group_port=TRL_PORT, connection_timeout=240)
    client.init_communicator(0)
    seconds = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        client.update_model_params(model)
        client.reset_prefix_cache()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    answers.put({"first_seconds": seconds[0], "seconds": seconds[1:]})
    client.close_communicator()


def peer(config: PretrainedConfig, folder: Path, repeats: int) -> dict[str, Any]:
    """The same with TRL and the server that its documentation starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--host", "127.0.0.1",
        "--port", str(port), "--weight-transfer-config", '{"backend": "nccl"}', "--logprobs-mode", "processed_logprobs",
        "--max-logprobs", "-1", "--max-model-len", "2048", "--load-format", "dummy", "--dtype", "bfloat16",
        "--enforce-eager", "--gpu-memory-utilization", "0.5",
    ]  # fmt: skip
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "1", "VLLM_SERVER_DEV_MODE": "1"}
    os.environ["VLLM_HOST_IP"] = "127.0.0.1"  # where TRL's side of the process group listens
    log = Path(f"{folder}.log")
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/health", server, 240)
        context = mp.get_context("spawn")
        answers = context.Queue()
        trainer = context.Process(target=trl_pushes, args=(config, url, repeats, answers))
        trainer.start()
        try:
            return answers.get(timeout=180) | {"trl": metadata.version("trl")}
        finally:
            trainer.join(20)
            trainer.kill()
    except (OSError, queue.Empty) as error:
        # Ours is reported all the same.
        return {"error": f"{type(error).__name__}: {error}", "log": log.read_text(errors="replace")[-3000:]}
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(30)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="tiny")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="measure TRL's push as well; needs TRL and two GPUs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda:0" if torch.cuda.device_count() > 1 else "cpu"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "model")
        config = shapes.save_config(args.shape, folder)
        context = mp.get_context("spawn")
        answers = context.Queue()
        # In a process of its own, which gives its memory back.
        ours = context.Process(target=_answer, args=(answers, config, folder, device, args.repeats))
        ours.start()
        pushed = answers.get(timeout=480)
        ours.join(60)
        if isinstance(pushed, str):
            sys.exit(pushed)
        broadcast = broadcasts(device, pushed["bytes"], args.repeats, name)
        best, floor = min(pushed["seconds"]), min(broadcast)
        result: dict[str, Any] = {
            "shape": args.shape,
            "device": torch.cuda.get_device_name(0) if device != "cpu" else f"{platform.machine()} CPU",
            "versions": {p: metadata.version(p) for p in ("torch", "transformers")},
            "push": pushed,
            "broadcast_seconds": broadcast,
            "gb_per_second": {"push": pushed["bytes"] / best / 1e9, "broadcast": pushed["bytes"] / floor / 1e9},
            "ratio": best / floor,
        }
        report(result)
        if args.out:
            args.out.write_text(json.dumps(result, indent=2) + "\n")
        if args.peer:
            result["trl"] = peer(config, folder, args.repeats)
            if args.out:
                args.out.write_text(json.dumps(result, indent=2) + "\n")
            if "error" in result["trl"]:
                sys.exit(f"TRL: {result['trl']['error']}\n{result['trl']['log']}")
            theirs = min(result["trl"]["seconds"])
            print(f"  TRL's push  {theirs:8.3f} s  {theirs / best:.1f} times ours")


def _answer(answers: Any, *arguments: Any) -> None:
    try:
        answers.put(pushes(*arguments))
    except BaseException as error:
        answers.put(f"{type(error).__name__}: {error}")
        raise


def report(result: dict[str, Any]) -> None:
    """For people."""
    pushed, rates = result["push"], result["gb_per_second"]
    print(f"{result['shape']}: {pushed['bytes'] / 1e9:.2f} GB in {pushed['tensors']} tensors on {result['device']}")
    paused = ", ".join(f"{seconds:.3f}" for seconds in pushed["paused"])
    busy = ", ".join(f"{seconds:.3f}" for seconds in pushed["busy_seconds"])
    print(f"  push        {min(pushed['seconds']):8.3f} s  {rates['push']:7.1f} GB/s")
    print(f"  beside generation {busy} s, which was paused for {paused} s")
    print(f"  broadcast   {min(result['broadcast_seconds']):8.3f} s  {rates['broadcast']:7.1f} GB/s")
    print(f"  ratio {result['ratio']:.2f}; the first push took {pushed['first_seconds']:.2f} s", flush=True)


if __name__ == "__main__":
    main()
