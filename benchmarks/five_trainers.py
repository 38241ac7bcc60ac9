"""SmolLM2's word problems with each of the five trainers, as many steps each, and their curves in one JSON file.

The runs share one GPU and begin together, so their seconds say nothing; their curves do. Every engine is given a fixed
cache, since vLLM's own measurement of free memory would count the other runs.

    python examples/smollm2/make_model.py && python examples/smollm2/make_data.py
    python benchmarks/five_trainers.py --out benchmarks/results/five_trainers_h200.json      # and a PNG beside it
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import curves

EXAMPLE = Path(__file__).parents[1] / "examples" / "smollm2"
SHARED = {
    "max_completion_length": 64, "temperature": 1.0, "learning_rate": 1e-5, "warmup_steps": 10,
    "gradient_accumulation_steps": 4, "eval_steps": 20, "log_completions": False,
    "logging_steps": 1, "html_report": False, "save_strategy": "no",
}  # fmt: skip
# 256 completions a step, or 128 pairs.
GROUPS = {"per_device_train_batch_size": 64, "num_generations": 16}
PAIRS = {"per_device_train_batch_size": 32, "beta": 0.1}
# Two completions that the reward finds equal teach a pairwise trainer nothing, or noise: they are told how near a
# wrong answer is.
TRAINERS = {
    "grpo": GROUPS,
    "rloo": GROUPS | {"beta": 0.001},
    "online-dpo": PAIRS,
    "nash-md": PAIRS | {"beta": 0.01},
    "xpo": PAIRS,
}


def command(name: str, args: argparse.Namespace, folder: str) -> list[str]:
    """How a trainer is run."""
    options: dict[str, object] = {
        "model_name_or_path": args.model, "dataset_name": args.data, "output_dir": folder, "max_steps": args.steps,
        "vllm_engine_kwargs": json.dumps({"kv_cache_memory_bytes": args.cache_mib << 20}),
    } | SHARED | TRAINERS[name] | json.loads(args.options)  # fmt: skip
    config = EXAMPLE / ("grpo.yaml" if name in ("grpo", "rloo") else "pairs.yaml")
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "slipstream", name, "--config", str(config), *words]


def finish(process: subprocess.Popen, folder: Path, seconds: float) -> dict:
    """What a run leaves behind; of one that is late, or died, the curve up to its last checkpoint."""
    try:
        code = process.wait(max(seconds, 0))
        problem = f"exit status {code}" if code else None
    except subprocess.TimeoutExpired:
        process.terminate()  # it closes its engine
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        problem = "not done in time"
    lines = folder.with_suffix(".log").read_text(errors="replace").strip().splitlines()
    saved = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    state = folder / "trainer_state.json" if (folder / "trainer_state.json").exists() else (saved or [None])[-1]
    if problem:
        print(f"{folder.name}: {problem}", *lines[-25:], sep="\n")
    return {
        "finished": problem is None,
        "last_line": problem or lines[-1],
        "curve": curves.curve(json.loads(state.read_text())) if state else [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="runs/smollm2/model")
    parser.add_argument("--data", default="runs/smollm2/data")
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--cache-mib", type=int, default=6144, help="memory of each engine's cache")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that all runs together may take")
    parser.add_argument("--options", default="{}", help="further settings of all trainers, as JSON")
    args = parser.parse_args()
    machine = subprocess.run(
        [sys.executable, "-m", "slipstream", "env", "--json"], capture_output=True, text=True, timeout=120
    )
    result: dict = {"steps": args.steps, "machine": json.loads(machine.stdout), "runs": {}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for name in args.trainers:
            with Path(folder, f"{name}.log").open("wb") as output:
                running[name] = subprocess.Popen(
                    command(name, args, f"{folder}/{name}"), stdout=output, stderr=subprocess.STDOUT
                )
        deadline = time.monotonic() + args.timeout
        for name, process in running.items():
            run = finish(process, Path(folder, name), deadline - time.monotonic())
            print(f"{name:12}{run['last_line']}", flush=True)
            if run["curve"]:
                result["runs"][name] = {"options": TRAINERS[name], **run}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    curves.draw({name: run["curve"] for name, run in result["runs"].items()}, args.out.with_suffix(".png"))
    if any(not result["runs"].get(name, {}).get("finished") for name in args.trainers):
        sys.exit(1)


if __name__ == "__main__":
    main()
