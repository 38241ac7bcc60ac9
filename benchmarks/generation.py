"""What the sampled tokens' log-probabilities and vLLM's bookkeeping cost, in six ways that take turns in one engine.

`none`: without any, steps scheduled for all sequences at once. `ours`: the same with log-probabilities, gathered on
the device and fetched once a call. `apart`: as `ours`, but decode steps on a GPU read a prompt for each of its
completions, not once. `each`: as `none`, but vLLM schedules every sequence by itself. `flat`: vLLM's log-probabilities,
in flat lists, final answers only. `trl`: as TRL asks, a request a completion, with text and an object a token. Lengths
are fixed. Prints a table and writes JSON; ratios are of the median seconds, to `none`'s.

    python benchmarks/generation.py --out benchmarks/results/generation_cpu.json                        # on a CPU
    python benchmarks/generation.py --shape qwen2-1.5b --prompts 64 --completions 8 --tokens 512 --dtype bfloat16 \
        --out benchmarks/results/generation_h200_1.5b.json                                              # on a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import shapes
import torch
from transformers import AutoModelForCausalLM

from slipstream.generation.colocate import ColocateEngine
from slipstream.generation.engine import Request, Sampling
from slipstream.vllm_compat import load, process, token_prompt
from slipstream.vllm_compat.steady_batch import Batch
from slipstream.weights.export import named_tensors

WAYS = ("none", "ours", "apart", "each", "flat", "trl")


def make_engine(path: Path, args: argparse.Namespace) -> ColocateEngine:
    """An engine that holds the model's weights and runs all completions at the same time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = ColocateEngine(
        model=str(path),
        dtype=args.dtype,
        max_model_len=args.prompt_tokens + args.tokens,
        max_num_seqs=args.prompts * args.completions,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.dtype)).to(device)
    engine.update_weights(0, named_tensors(model))
    return engine


def generate(engine: ColocateEngine, way: str, prompts: list[list[int]], completions: int, tokens: int) -> float:
    """Seconds of one call. Raises RuntimeError if a completion has another length."""
    recorder = engine._recorder
    if way == "ours" and recorder is None:
        raise RuntimeError("this engine does not gather log-probabilities itself: see its warning")
    batch_of = Batch.__dict__["of"]
    if way in ("each", "flat", "trl"):  # vLLM's own scheduling
        Batch.of = staticmethod(lambda *args: None)
    if way == "flat":
        engine._recorder = None
    runner = getattr(process.worker_of(engine._llm).model_runner.execute_model, "__self__", None)
    shared = getattr(runner, "shared", None)
    if way == "apart" and shared is not None:
        runner.shared = None
    start = time.perf_counter()
    try:
        lengths = call(engine, way, prompts, completions, tokens)
        seconds = time.perf_counter() - start
    finally:
        engine._recorder, Batch.of = recorder, batch_of
        if shared is not None:
            runner.shared = shared
    if lengths != {tokens}:
        raise RuntimeError(f"{way}: completions have lengths {sorted(lengths)} instead of {tokens}")
    return seconds


def call(engine: ColocateEngine, way: str, prompts: list[list[int]], completions: int, tokens: int) -> set[int]:
    """Ask for completions; their lengths."""
    if way == "trl":
        params = load().SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=tokens, logprobs=0)
        repeated = [token_prompt(ids) for ids in prompts for _ in range(completions)]
        with engine._guest.inside():
            outputs = engine._llm.generate(repeated, params, use_tqdm=False)
            # TRL reads every token's object.
            logps = [[next(iter(d.values())).logprob for d in o.outputs[0].logprobs] for o in outputs]
        return {len(row) for row in logps}
    sampling = Sampling(tokens, logprobs=way in ("ours", "apart", "flat"), extra={"ignore_eos": True})
    answers = engine.generate([Request(ids, n=completions) for ids in prompts], sampling)
    return {len(c.ids) for group in answers for c in group}


def measure(engine: ColocateEngine, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every call by way; a round that would end behind the limit is left out, but for the first."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = len(engine._llm.get_tokenizer())
    prompts = torch.randint(5, min(90, vocabulary), (args.prompts, args.prompt_tokens), generator=generator).tolist()
    for way in WAYS:
        generate(engine, way, prompts, args.completions, min(8, args.tokens))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    begin = time.perf_counter()
    for done in range(args.repeats):
        spent = time.perf_counter() - begin
        if done and spent + spent / done > args.limit:
            break
        for way in WAYS if done % 2 == 0 else reversed(WAYS):
            seconds[way].append(generate(engine, way, prompts, args.completions, args.tokens))
            print(f"{way:6}{seconds[way][-1]:10.3f} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=shapes.QUICKSTART)
    parser.add_argument("--shape", choices=sorted(shapes.SHAPES), help="random weights instead of --model")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--completions", type=int, default=8, help="of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="of each completion")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that all measured rounds may take")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.6)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.model
        if args.shape:
            path = shapes.save(args.shape, Path(folder), getattr(torch, args.dtype))
        engine = make_engine(path, args)
        try:
            seconds = measure(engine, args)
        finally:
            engine.close()
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    result: dict[str, Any] = {
        "versions": {"vllm": load().__version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "options": {
            name: os.path.relpath(v, Path(__file__).parents[1]) if isinstance(v, Path) else v
            for name, v in vars(args).items()
            if name != "out"
        },
        "seconds": seconds,
        "median_seconds": medians,
        "ratio_to_none": {way: value / medians["none"] for way, value in medians.items()},
        "ms_per_step": {way: 1000 * value / args.tokens for way, value in medians.items()},
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    for way in WAYS:
        print(f"{way:6}{medians[way]:10.3f} s {result['ms_per_step'][way]:10.2f} ms/step", end=" ")
        print(f"{result['ratio_to_none'][way]:8.3f} x")


if __name__ == "__main__":
    main()
