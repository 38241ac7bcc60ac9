"""What a generation server costs beside an engine in the trainer's process, on a CPU with tiny models.

Three claims: the same generation through the server takes at most 1.15 times as long; reading its answers takes at most
5% of the processor time that parsing the same answers of /v1/completions does; and how fast weights travel.

    python benchmarks/server_path.py --out benchmarks/results/server_path_cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import httpx
import psutil
import tiny
import torch
from serving.servers import Server, start_server
from transformers import AutoModelForCausalLM

import slipstream
from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.serving import wire
from slipstream.serving.client import VLLMClient

PROMPTS, SAMPLES, TOKENS = 32, 8, 64
SAMPLING = Sampling(max_tokens=TOKENS, extra={"ignore_eos": True})
TRANSPORTS = ("shared_memory", "body", "group")
OPTIONS = ("--max-num-seqs", "256")


def requests(seed: int) -> list[Request]:
    """Prompts that no prefix cache knows."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(5, 100, (PROMPTS, 48), generator=generator).tolist()
    return [Request(ids, n=SAMPLES, seed=1000 * index) for index, ids in enumerate(prompts)]


def timed(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, and seconds of this process's processors, that a call takes; and its result."""
    wall, processor = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - wall, time.process_time() - processor, result


def generation(model: Path, client: VLLMClient, repeats: int) -> dict[str, Any]:
    """The same completions from an engine in this process and from the server, in turns."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = [(name, parameter.detach()) for name, parameter in policy.named_parameters()]
    engine = ColocateEngine(model=str(model), dtype="float32", max_model_len=256, max_num_seqs=256)
    try:
        engine.update_weights(1, weights)
        client.init_communicator("cpu")
        client.update_weights(1, weights)
        engine.generate(requests(0), SAMPLING)
        client.sample(requests(0), SAMPLING)
        seconds: dict[str, list[float]] = {"in_process": [], "server": []}
        for repeat in range(1, repeats + 1):
            batch = requests(repeat)
            wall, _, here = timed(lambda batch=batch: engine.generate(batch, SAMPLING))
            seconds["in_process"].append(wall)
            wall, _, there = timed(lambda batch=batch: client.sample(batch, SAMPLING))
            seconds["server"].append(wall)
            if [len(c.ids) for row in here + there for c in row] != [TOKENS] * (2 * PROMPTS * SAMPLES):
                raise RuntimeError("the two did not sample the same number of tokens")
        same = sum(a.ids == b.ids for x, y in zip(here, there, strict=True) for a, b in zip(x, y, strict=True))
    finally:
        engine.close()
    best = {name: min(values) for name, values in seconds.items()}
    return {
        "seconds": seconds, "best": best, "ratio": best["server"] / best["in_process"],
        "equal_completions": f"{same} of {PROMPTS * SAMPLES}",
    }  # fmt: skip


def reading(model: Path, server: Server, client: VLLMClient, repeats: int) -> dict[str, Any]:
    """Processor time of reading completions that are there: our frames, and the JSON of /v1/completions."""
    batch = requests(0)
    message = wire.GenerateMessage(
        prompts=[wire.PromptMessage(ids=wire.pack_ids(r.prompt_ids), n=r.n, seed=r.seed) for r in batch],
        sampling=wire.sampling_message(SAMPLING),
    )
    pieces = list(client._connection.stream("/generate", message))
    question = {
        "model": str(model), "prompt": [list(r.prompt_ids) for r in batch], "n": SAMPLES, "max_tokens": TOKENS,
        "logprobs": 0, "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip

    def ask() -> bytes:
        answer = httpx.post(f"{server.url}/v1/completions", json=question, headers=server.headers, timeout=300)
        answer.raise_for_status()
        return answer.content

    def frames() -> list[wire.CompletionFrame | wire.PromptFrame]:
        reader, read = wire.FrameReader(), []
        for piece in pieces:
            read += reader.feed(piece)
        reader.finish()
        return read

    def parsed() -> list[tuple[list[int], list[float]]]:
        return [(c["token_ids"], c["logprobs"]["token_logprobs"]) for c in json.loads(body)["choices"]]

    body = ask()
    if [len(ids) for ids, _ in parsed()] != [len(frame.completion.ids) for frame in frames()]:
        raise RuntimeError("the two answers are not of the same work")
    ours, theirs = (min(timed(read)[1] for _ in range(100 * repeats)) for read in (frames, parsed))
    # With sending the request and taking the answer off the socket.
    call = min(timed(lambda: client.sample(batch, SAMPLING))[1] for _ in range(repeats))
    their_call = min(timed(lambda: json.loads(ask()))[1] for _ in range(repeats))
    return {
        "frames": {"bytes": sum(map(len, pieces)), "seconds": ours, "seconds_of_the_call": call},
        "v1_completions": {"bytes": len(body), "seconds": theirs, "seconds_of_the_call": their_call},
        "ratio": ours / theirs, "ratio_of_calls": call / their_call,
    }  # fmt: skip


def transports(model: Path, client: VLLMClient, repeats: int) -> dict[str, Any]:
    """Megabytes a second of whole updates: sending, verifying, loading."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = [(name, parameter.detach()) for name, parameter in policy.named_parameters()]
    found: dict[str, Any] = {}
    version = client.server_info().version or 0
    for transport in TRANSPORTS:
        client.init_communicator("cpu", transport)
        seconds = []
        for _ in range(repeats + 1):
            version += 1
            report = client.update_weights(version, weights)
            seconds.append(report.seconds)
        client.close_communicator()
        found[transport] = {
            "bytes": report.nbytes, "first_seconds": seconds[0], "seconds": seconds[1:],
            "mb_per_second": report.nbytes / 1e6 / min(seconds[1:]),
        }  # fmt: skip
    return found


def table(found: dict[str, Any]) -> str:
    """The figures, as text."""
    made, read = found["generation"], found["reading"]
    ours, theirs = read["frames"], read["v1_completions"]
    lines = [
        f"{PROMPTS * SAMPLES} completions of {TOKENS} tokens, best of {len(made['seconds']['server'])}",
        f"  in this process       {made['best']['in_process']:8.3f} s",
        f"  through the server    {made['best']['server']:8.3f} s    {made['ratio']:.3f} x  (goal 1.15)",
        "processor time of reading them",
        f"  /v1/completions       {theirs['seconds'] * 1e3:8.2f} ms   of {theirs['bytes']} B",
        f"  frames                {ours['seconds'] * 1e3:8.2f} ms   of {ours['bytes']} B    "
        f"{100 * read['ratio']:.1f}%  (goal 5%)",
        f"  whole calls           {100 * read['ratio_of_calls']:8.1f} %",
        "weights, whole updates",
    ]
    for name, values in found["transports"].items():
        lines.append(
            f"  {name:<20}  {values['mb_per_second']:8.0f} MB/s   {min(values['seconds']):.2f} s for "
            f"{values['bytes'] / 1e6:.0f} MB, the first {values['first_seconds']:.2f} s"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/server_path_cpu.json"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=11, help="of the model whose weights travel: 36 MB each")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        tiny.build(small)
        tiny.build(large, layers=options.layers, hidden=1024)
        server = start_server(small, *OPTIONS)
        try:
            with VLLMClient(base_url=server.url, api_key=server.key) as client:
                found["reading"] = reading(small, server, client, options.repeats)
                found["generation"] = generation(small, client, options.repeats)
                found["vllm"] = client.server_info().vllm
        finally:
            server.stop()
        server = start_server(large)
        try:
            with VLLMClient(base_url=server.url, api_key=server.key) as client:
                found["transports"] = transports(large, client, options.repeats)
        finally:
            server.stop()
    found["versions"] = {
        "slipstream": slipstream.__version__, "vllm": found.pop("vllm"), "torch": torch.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    found["machine"] = {
        "processor": platform.processor() or platform.machine(), "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1), "load_average": os.getloadavg(),
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
