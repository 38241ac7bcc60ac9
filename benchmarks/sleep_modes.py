"""GRPO with the engine awake all the time, and asleep between generations at level 1 and 2.

Runs `slipstream grpo` once for each mode with the same seed and writes one JSON file: versions and device, the log
history of each run, and a summary that leaves out the first two steps (compilation, first allocation).

    python benchmarks/sleep_modes.py examples/smollm2/grpo.yaml --out benchmarks/results/h200_sleep.json \
        -- --model_name_or_path models/smollm2 --max_steps 20
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODES = {
    "awake": [],
    "level 1": ["--vllm_enable_sleep_mode", "true", "--vllm_sleep_level", "1"],
    "level 2": ["--vllm_enable_sleep_mode", "true", "--vllm_sleep_level", "2"],
}
SHOWN = [
    "step_time", "time/generate", "time/train", "time/sync", "time/wait", "memory/peak_gb", "reward",
    "sampling/sampling_logp_difference/mean",
]  # fmt: skip


def run(config: str, options: list[str], mode: str, timeout: float) -> dict:
    """One run in a process of its own; its log history, or what it printed when it failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "slipstream", "grpo", "--config", config, "--output_dir", folder,
            "--save_strategy", "no", "--logging_steps", "1", *options, *MODES[mode],
        ]  # fmt: skip
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        seconds = time.perf_counter() - start
        state = Path(folder, "trainer_state.json")
        if done.returncode or not state.exists():
            return {"error": done.stderr[-3000:], "seconds": seconds}
        history = json.loads(state.read_text())["log_history"]
        last_line = done.stdout.strip().splitlines()[-1]
    steady = [entry for entry in history if "loss" in entry][2:]
    summary = {}
    for name in SHOWN:
        values = [entry[name] for entry in steady if entry.get(name) is not None]
        if values:
            summary[name] = sum(values) / len(values)
    return {"seconds": seconds, "last_line": last_line, "summary": summary, "log_history": history}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a run may take")
    parser.usage = "%(prog)s config --out FILE [options] [-- options of slipstream grpo]"
    # argparse, from Python 3.12 on, takes no positional arguments after -- that come behind an option.
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, options = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    machine = subprocess.run(
        [sys.executable, "-m", "slipstream", "env", "--json"], capture_output=True, text=True, timeout=120
    )
    result: dict = {"config": args.config, "options": options, "machine": json.loads(machine.stdout), "runs": {}}
    for mode in args.modes:
        result["runs"][mode] = run(args.config, options, mode, args.timeout)
        print(mode, result["runs"][mode].get("error") or result["runs"][mode]["last_line"], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))
    print(f"{'':42}" + "".join(f"{mode:>12}" for mode in result["runs"]))
    for name in SHOWN:
        cells = [one.get("summary", {}).get(name) for one in result["runs"].values()]
        print(f"{name:42}" + "".join(f"{'' if v is None else format(v, '.4g'):>12}" for v in cells))
    if any("error" in one for one in result["runs"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
