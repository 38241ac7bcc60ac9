"""Pushing a model's weights to a server, beside a plain broadcast of the same bytes between the same two devices.

    python benchmarks/weight_push.py --shape qwen2-1.5b --out benchmarks/results/h200_weight_push.json   # two GPUs
    python benchmarks/weight_push.py --shape tiny                                                       # a CPU, gloo

The trainer's side is device 0, the server's device 1; weights are random. The server generates nothing meanwhile; how
long it could not have is `paused`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from serving.servers import start_server
from transformers import AutoModelForCausalLM, Qwen2Config

from slipstream.serving.client import VLLMClient

CHUNK = 1 << 30  # bytes of one plain broadcast
SHAPES = {
    "tiny": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8,
             "num_key_value_heads": 2, "vocab_size": 32_000, "tie_word_embeddings": True},
    "qwen2-1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                   "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True},
    "qwen2-7b": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
                 "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False},
}  # fmt: skip


def make_shape(name: str, folder: Path) -> Qwen2Config:
    """The folder of a model without weights: what a server needs that is told to make them up."""
    vocabulary = tiny.tokenizer()
    config = Qwen2Config(max_position_embeddings=4096, eos_token_id=vocabulary.eos_token_id, **SHAPES[name])
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    vocabulary.save_pretrained(folder)
    return config


def pushes(config: Qwen2Config, folder: Path, device: str, repeats: int) -> dict[str, Any]:
    """Updates of a server's weights; the first one makes the connection and the plan."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    environment = {"CUDA_VISIBLE_DEVICES": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"} if device != "cpu" else {}
    options = ["--load-format", "dummy", "--dtype", "bfloat16", "--enforce-eager"]
    server = start_server(folder, *options, env=environment, timeout=300)
    try:
        with VLLMClient(base_url=server.url, api_key=server.key) as client:
            client.init_communicator(0 if device != "cpu" else "cpu", "group")
            reports = [client.update_weights(version, weights) for version in range(1, repeats + 2)]
    finally:
        server.stop()
    return {
        "bytes": reports[0].nbytes, "tensors": reports[0].tensors, "first_seconds": reports[0].seconds,
        "seconds": [r.seconds for r in reports[1:]], "paused": [r.paused for r in reports[1:]],
    }  # fmt: skip


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda:0" if torch.cuda.device_count() > 1 else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        config = make_shape(args.shape, Path(folder))
        pushed = pushes(config, Path(folder), device, args.repeats)
        context = mp.get_context("spawn")
        answers = context.Queue()
        members = [
            context.Process(target=plain, args=(r, device, pushed["bytes"], args.repeats, f"{folder}/meet", answers))
            for r in range(2)
        ]
        for member in members:
            member.start()
        broadcast = answers.get(timeout=300)
        for member in members:
            member.join(60)
    best, floor = min(pushed["seconds"]), min(broadcast)
    result = {
        "shape": args.shape,
        "device": torch.cuda.get_device_name(0) if device != "cpu" else f"{platform.machine()} CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "push": pushed,
        "broadcast_seconds": broadcast,
        "gb_per_second": {"push": pushed["bytes"] / best / 1e9, "broadcast": pushed["bytes"] / floor / 1e9},
        "ratio": best / floor,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{args.shape}: {pushed['bytes'] / 1e9:.2f} GB in {pushed['tensors']} tensors on {result['device']}")
    rates, paused = result["gb_per_second"], min(pushed["paused"])
    print(f"  push        {best:8.3f} s  {rates['push']:7.1f} GB/s, paused {paused:.3f} s")
    print(f"  broadcast   {floor:8.3f} s  {rates['broadcast']:7.1f} GB/s")
    print(f"  ratio {result['ratio']:.2f}; the first push took {pushed['first_seconds']:.2f} s")


if __name__ == "__main__":
    main()
