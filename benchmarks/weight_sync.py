"""A colocated engine's weight update, beside one copy of the same bytes on the same device.

    python benchmarks/weight_sync.py --shape qwen2-1.5b --out benchmarks/results/weight_sync_h200.json      # on a GPU
    python benchmarks/weight_sync.py --shape tiny

An update says how it was done (`direct`: plain copies into the engine's own tensors) and what its parts took; checks
that weights arrived are parts of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

import shapes
import torch
from grpo_side import synchronize
from transformers import AutoModelForCausalLM

from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.weights.export import named_tensors


def copies(tensors: list[torch.Tensor], repeats: int) -> list[float]:
    """Seconds of copying all tensors, each to memory of its own."""
    targets = [torch.empty_like(tensor) for tensor in tensors]
    seconds = []
    for _ in range(repeats + 1):
        synchronize()
        begin = time.perf_counter()
        torch._foreach_copy_(targets, tensors)
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def one_copy(size: int, device: str, repeats: int) -> list[float]:
    """Seconds of one copy of `size` bytes."""
    return copies([torch.zeros(size, dtype=torch.uint8, device=device)], repeats)


def measure(shape: str, repeats: int, cache_gib: float) -> dict[str, Any]:
    """Updates of a random model's engine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        path = shapes.save(shape, Path(folder, "model"), dtype)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
        options: dict[str, Any] = {"kv_cache_memory_bytes": int(cache_gib * 2**30), "enforce_eager": True}
        engine = ColocateEngine(model=str(path), dtype=str(dtype).removeprefix("torch."), max_model_len=256,
                                max_num_seqs=16, engine_kwargs=options)  # fmt: skip
        try:
            seconds, parts = [], []
            for version in range(repeats + 2):
                with torch.no_grad():
                    next(model.parameters()).mul_(1.01)  # bfloat16 has no smaller step
                synchronize()
                begin = time.perf_counter()
                report = engine.update_weights(version, named_tensors(model))
                synchronize()
                seconds.append(time.perf_counter() - begin)
                parts.append(dataclasses.asdict(engine.timings))
                # As between two updates in training: the caches have something to forget.
                engine.generate([Request([5, 6, 7])], Sampling(max_tokens=2))
        finally:
            engine.close()
    single = one_copy(report.nbytes, device, repeats)
    each = copies([t.detach() for _, t in named_tensors(model)], repeats)
    return {
        "shape": shape, "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "versions": {p: metadata.version(p) for p in ("torch", "transformers")}, "bytes": report.nbytes,
        "tensors": report.tensors, "update_seconds": seconds[2:], "parts": parts[2:], "copy_seconds": single,
        "copy_of_each_seconds": each, "ratio": statistics.median(seconds[2:]) / statistics.median(single),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="tiny")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--cache-gib", type=float, default=1.0, help="of the engine")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = measure(args.shape, args.repeats, args.cache_gib)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    size = result["bytes"] / 1e9
    print(f"{args.shape}: {size:.2f} GB in {result['tensors']} tensors on {result['device']}")
    for name in ("update_seconds", "copy_of_each_seconds", "copy_seconds"):
        middle = statistics.median(result[name])
        print(f"  {name:22}{middle * 1e3:9.2f} ms {2 * size / middle:9.0f} GB/s read and written")
    print(f"  ratio {result['ratio']:.2f}; parts of the last: {result['parts'][-1]}")


if __name__ == "__main__":
    main()
