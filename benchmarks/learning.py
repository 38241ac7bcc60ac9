"""The same learning as TRL's, in less time: SmolLM2 on the word problems, several seeds of ours and of TRL's.

    python examples/smollm2/make_model.py && python examples/smollm2/make_data.py
    python benchmarks/learning.py --out benchmarks/results/learning_h200.json        # and a PNG beside it
    python benchmarks/learning.py --model examples/quickstart/model --data examples/quickstart/data \
        --reward examples/quickstart/reward.py --steps 6 --max-tokens 4 --sides ours --seeds 0 --out /tmp/learning.json

Both sides are told the same by the same names; the seeds of a side run at once and share a GPU, each side has a GPU of
its own where there are two. An engine's cache is given a size, since vLLM's own measurement of free memory would count
the other runs.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from meeting import meeting_place

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

SIDES = ("ours", "trl")
NAMES = {"ours": "Slipstream", "trl": "TRL"}


def fields(args: argparse.Namespace, side: str, seed: int, folder: str) -> dict[str, Any]:
    """What a trainer is told."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": folder, "seed": seed, "max_steps": args.steps, "num_generations": args.group,
        "per_device_train_batch_size": args.micro_batch,
        "gradient_accumulation_steps": args.completions // args.micro_batch,
        "max_completion_length": args.max_tokens, "temperature": 1.0, "beta": 0.0, "learning_rate": 1e-5,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "bf16": on_gpu, "use_cpu": not on_gpu,
        "gradient_checkpointing": False, "model_init_kwargs": {"dtype": "float32"}, "use_vllm": True,
        "vllm_mode": "colocate", "vllm_max_model_length": args.max_length,
        "vllm_gpu_memory_utilization": args.vllm_memory, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True,
    } | ({"html_report": False} if side == "ours" else {})  # fmt: skip


def give_caches_a_size(size: int) -> None:
    """Every engine of this process gets a cache of `size` bytes; TRL has no field for it."""
    import vllm

    vllm.LLM.__init__ = functools.partialmethod(vllm.LLM.__init__, kv_cache_memory_bytes=size)


def train(args: argparse.Namespace, side: str, seed: int, out: Path) -> None:
    """One run: its rewards, and when each step ended."""
    import grpo_side
    from datasets import load_dataset
    from transformers import TrainerCallback

    if side == "ours":
        from slipstream import GRPOConfig, GRPOTrainer
    else:
        from trl import GRPOConfig, GRPOTrainer
    give_caches_a_size(args.cache_mib << 20)
    spec = importlib.util.spec_from_file_location("reward", args.reward)
    reward = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reward)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *given: Any, **kwargs: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *given: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter() - self.begin)

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=args.model, args=GRPOConfig(**fields(args, side, seed, folder)), reward_funcs=reward.correct,
            train_dataset=load_dataset(args.data, split="train"), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    lengths = [entry["completions/mean_length"] for entry in log]
    found = {"reward": [entry["reward"] for entry in log], "seconds": ends, "mean_length": lengths}
    out.write_text(json.dumps(found | {"versions": grpo_side.versions()}))


def agreement(runs: dict[str, dict[str, Any]], window: int = 10) -> dict[str, float]:
    """How far the sides' mean rewards are apart, and the seeds of a side from their mean, over windows of steps."""

    def windows(run: dict[str, Any]) -> list[float]:
        rewards = run["reward"]
        return [statistics.fmean(rewards[i : i + window]) for i in range(0, len(rewards) - window + 1, window)]

    curves = {side: [windows(run) for run in seeds.values()] for side, seeds in runs.items()}
    middle = {side: [statistics.fmean(points) for points in zip(*lines, strict=True)] for side, lines in curves.items()}
    noise = [
        statistics.stdev(points) for lines in curves.values() if len(lines) > 1 for points in zip(*lines, strict=True)
    ]
    apart = [abs(a - b) for a, b in zip(*middle.values(), strict=True)] if len(middle) == 2 else []
    return {
        **({"between_sides": statistics.fmean(apart), "largest": max(apart)} if apart else {}),
        **({"between_seeds": statistics.fmean(noise)} if noise else {}),
    }


def draw(runs: dict[str, dict[str, Any]], out: Path) -> None:
    """Rewards against steps and against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for side, color in zip(SIDES, ("tab:blue", "tab:orange"), strict=True):
        for i, run in enumerate(runs.get(side, {}).values()):
            rewards = run["reward"]
            smooth = [statistics.fmean(rewards[max(0, n - 4) : n + 1]) for n in range(len(rewards))]
            label = NAMES[side] if i == 0 else None
            left.plot(range(1, len(smooth) + 1), smooth, color=color, alpha=0.7, label=label)
            right.plot(run["seconds"], smooth, color=color, alpha=0.7, label=label)
    left.set(xlabel="step", ylabel="right answers (mean of 5 steps)")
    right.set(xlabel="seconds of training")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def start(args: argparse.Namespace, side: str, seed: int, folder: Path, device: str | None) -> subprocess.Popen[bytes]:
    """A run in a process of its own."""
    python = args.trl_python if side == "trl" else sys.executable
    log = (folder / f"{side}-{seed}.log").open("wb")
    environment = os.environ | meeting_place() | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    command = [python, *sys.argv, "--run", side, str(seed), str(folder / f"{side}-{seed}.json")]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="runs/smollm2/model")
    made.add_argument("--data", default="runs/smollm2/data")
    made.add_argument("--reward", default="examples/smollm2/reward.py", help="a file with a function `correct`")
    made.add_argument("--steps", type=int, default=60)
    made.add_argument("--completions", type=int, default=128, help="of a step")
    made.add_argument("--group", type=int, default=8, help="completions a prompt")
    made.add_argument("--micro-batch", type=int, default=32)
    made.add_argument("--max-tokens", type=int, default=64, help="of a completion")
    made.add_argument("--max-length", type=int, default=512, help="of a prompt and its completion")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    made.add_argument("--vllm-memory", type=float, default=0.15, help="vllm_gpu_memory_utilization of each run")
    made.add_argument("--cache-mib", type=int, default=8192, help="memory of each engine's cache")
    made.add_argument("--trl-python", default=sys.executable, help="an interpreter that has TRL")
    made.add_argument("--timeout", type=float, default=900.0, help="seconds for all runs")
    made.add_argument("--run", nargs=3, metavar=("SIDE", "SEED", "FILE"), help=argparse.SUPPRESS)
    made.add_argument("--out", type=Path, required=True)
    return made


def main() -> None:
    args = parser().parse_args()
    if args.run:
        side, seed, out = args.run
        train(args, side, int(seed), Path(out))
        return
    import torch

    devices = torch.cuda.device_count()
    names = {"device": torch.cuda.get_device_name() if devices else f"{os.cpu_count()} CPU cores", "devices": devices}
    settings = {k: v for k, v in vars(args).items() if k not in ("run", "out", "trl_python", "timeout")}
    result: dict[str, Any] = names | {"settings": settings, "runs": {side: {} for side in args.sides}}
    failed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running = {
            (side, seed): start(args, side, seed, folder, str(i % devices) if devices > 1 else None)
            for i, side in enumerate(args.sides)
            for seed in args.seeds
        }
        deadline = time.monotonic() + args.timeout
        for (side, seed), process in running.items():
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
            found = folder / f"{side}-{seed}.json"
            if found.exists():
                result["runs"][side][str(seed)] = json.loads(found.read_text())
            else:
                failed.append(f"{side} {seed}:\n{(folder / f'{side}-{seed}.log').read_text(errors='replace')[-3000:]}")
    result["agreement"] = agreement(result["runs"])
    args.out.write_text(json.dumps(result) + "\n")
    for side, seeds in result["runs"].items():
        for seed, run in seeds.items():
            last = statistics.fmean(run["reward"][-5:])
            print(f"{side:5} seed {seed}: {run['reward'][0]:.2f} -> {last:.2f} in {run['seconds'][-1]:.0f} s")
    print("rewards apart:", {name: round(value, 3) for name, value in result["agreement"].items()})
    if importlib.util.find_spec("matplotlib"):
        draw(result["runs"], args.out.with_suffix(".png"))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
