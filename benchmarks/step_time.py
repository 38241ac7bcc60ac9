"""Whole GRPO steps, ours and TRL's: the same model, prompts, lengths and batch on the same machine.

Each side runs in a process of its own, one after the other, TRL with the interpreter of --trl-python (TRL 1.16 takes
vLLM 0.22 to 0.31).
Sides: `ours` with the tokens of TRL's micro-batch in each of its own, `liger` the same with Liger's kernels, `lean`
with these and gradient checkpointing, `measured` with as many tokens as fit into the memory; `trl`, and `trl-liger`
with Liger's kernels. The first steps are left out. Writes JSON and prints a table; ratios are the seconds of `trl` over
ours. Runs of natural lengths sample different completions: see the tokens per second, or take --fixed-length.

    python benchmarks/step_time.py --shape qwen2-1.5b --completions 512 --sides ours measured trl \
        --out benchmarks/results/step_time_h200_1.5b_512.json                       # on a GPU
    python benchmarks/step_time.py --model examples/quickstart/model --generation transformers --completions 64 \
        --micro-batch 16 --max-tokens 32 --fixed-length --trl-python .venv-peer/bin/python \
        --out benchmarks/results/step_time_cpu.json                                  # on a CPU, after `make peer`
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import shapes
import torch
from grpo_side import PEER, SIDES
from meeting import meeting_place

PHASES = ("generate", "score", "sync", "forward", "train")


def run_side(side: str, python: str, settings: dict[str, Any], folder: Path, timeout: float) -> dict[str, Any]:
    """One side's measurements, or what it said when it failed."""
    given, out = folder / "settings.json", folder / f"{side}.json"
    given.write_text(json.dumps(settings | {"folder": str(folder / side), "timeout": timeout}))
    command = [python, str(Path(__file__).with_name("grpo_side.py")), side, str(given), str(out)]
    said = folder / f"{side}.log"
    with said.open("w") as log:
        try:
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=timeout, env=os.environ | meeting_place()
            ).returncode
            error = {"error": said.read_text(errors="replace")[-3000:]} if code else {}
        except subprocess.TimeoutExpired:
            error = {"error": f"{said.read_text(errors='replace')[-3000:]}\nnot done after {timeout:.0f} seconds"}
    # What was measured before something failed counts all the same.
    return json.loads(out.read_text()) | error if out.exists() else error


def compare(sides: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times TRL's seconds are ours, how many times our tokens a second are TRL's, and the memory."""
    trl = sides.get("trl", {})
    ratios = {}
    for name, own in sides.items():
        if name in PEER or "step_seconds" not in own or "step_seconds" not in trl:
            continue
        ratios[name] = {
            "step": trl["step_seconds"] / own["step_seconds"],
            "tokens_per_second": own["tokens_per_second"] / trl["tokens_per_second"],
            "memory": own["peak_gib"] / trl["peak_gib"],
        }
        if trl.get("passing_gib"):
            ratios[name]["passing_memory"] = own["passing_gib"] / trl["passing_gib"]
        for phase in ("generate", "sync"):
            if trl["phases"].get(phase) and own["phases"].get(phase):
                ratios[name][phase] = trl["phases"][phase] / own["phases"][phase]
        learning = [sum(s["phases"].get(p, 0.0) for p in ("forward", "train")) for s in (trl, own)]
        ratios[name]["training"] = learning[0] / learning[1]
    return ratios


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'':10}{'step s':>8}" + "".join(f"{p:>10}" for p in PHASES) + f"{'GiB':>8}{'length':>8}{'tokens/s':>10}"]
    for name, side in result["sides"].items():
        if "error" in side:
            lines.append(f"{name:10}{side['error'].strip().splitlines()[-1]}")
        if "step_seconds" not in side:
            continue
        phases = "".join(f"{side['phases'].get(p, 0.0):10.3f}" for p in PHASES)
        lines.append(
            f"{name:10}{side['step_seconds']:8.3f}{phases}{side['peak_gib']:8.1f}{side['mean_length']:8.1f}"
            f"{side['tokens_per_second']:10.0f}"
        )
    for name, ratios in result["ratios"].items():
        lines.append(f"{name}: " + ", ".join(f"{what} {value:.2f}" for what, value in ratios.items()))
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    on_gpu = torch.cuda.is_available()
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a folder")
    what.add_argument("--shape", choices=shapes.SHAPES, help="random weights of this shape")
    made.add_argument("--completions", type=int, default=128, help="of a step")
    made.add_argument("--group", type=int, default=8, help="completions a prompt")
    made.add_argument("--micro-batch", type=int, default=32, help="completions")
    made.add_argument("--prompt-tokens", type=int, default=0, help="at least")
    made.add_argument("--max-tokens", type=int, default=512, help="of a completion")
    length = made.add_mutually_exclusive_group()
    length.add_argument("--fixed-length", action="store_true", help="every completion has --max-tokens tokens")
    length.add_argument(
        "--end-every", type=float, metavar="TOKENS", help="with --shape: a token ends a completion once in so many"
    )
    made.add_argument("--steps", type=int, default=8)
    made.add_argument("--skip", type=int, default=2, help="first steps that do not count")
    made.add_argument("--generation", choices=("vllm", "transformers"), default="vllm")
    made.add_argument("--weights", default="bfloat16" if on_gpu else "float32", help="their dtype")
    made.add_argument("--tokens", type=int, help="of our micro-batches; by default as many as TRL's have")
    made.add_argument("--gradient-checkpointing", action="store_true")
    made.add_argument("--vllm-memory", type=float, default=0.3, help="vllm_gpu_memory_utilization")
    made.add_argument("--sleep", action="store_true", help="vLLM sleeps while the trainer works")
    made.add_argument("--sides", nargs="+", choices=SIDES, default=["ours", "trl"])
    made.add_argument("--trl-python", default=sys.executable, help="an interpreter that has TRL")
    made.add_argument("--timeout", type=float, default=900.0, help="seconds for a side")
    made.add_argument("--keep", action="store_true", help="keep what FILE has of other sides, with the same settings")
    made.add_argument("--out", type=Path, required=True, metavar="FILE")
    return made


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a side needs to know; errors for what cannot be."""
    if args.skip < 1 or args.steps <= args.skip:
        sys.exit(f"--steps {args.steps} --skip {args.skip}: at least one step is left out and one is measured")
    if args.completions % args.micro_batch or args.completions % args.group:
        sys.exit(f"--completions {args.completions}: must be a multiple of --micro-batch and of --group")
    left_out = ("generation", "sides", "trl_python", "timeout", "keep", "out", "model")
    return {k: v for k, v in vars(args).items() if k not in left_out} | {
        "vllm": args.generation == "vllm", "model": args.model and os.path.abspath(args.model),
    }  # fmt: skip


def main() -> None:
    args = parser().parse_args()
    settings = settings_of(args)
    shown = settings | {"model": Path(args.model).name if args.model else None}
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "machine": platform.machine(), "settings": shown, "sides": {},
    }  # fmt: skip
    if args.keep and args.out.exists():
        before = json.loads(args.out.read_text())
        if any(before[name] != result[name] for name in ("device", "settings")):
            sys.exit(f"--keep: {args.out} is of another device or other settings: {before['settings']}")
        result["sides"] = before["sides"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.shape:
            made = shapes.save(args.shape, folder / "model", getattr(torch, args.weights), end_every=args.end_every)
            settings["model"] = str(made)
        for side in args.sides:
            python = args.trl_python if side in PEER else sys.executable
            result["sides"][side] = run_side(side, python, settings, folder, args.timeout)
            result["ratios"] = compare(result["sides"])
            # After each side: what there is stays if the next one is cut off.
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            print(table(result), flush=True)
    if any("error" in result["sides"][side] for side in args.sides):
        sys.exit(1)


if __name__ == "__main__":
    main()
