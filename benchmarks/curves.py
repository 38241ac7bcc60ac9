"""Draw runs' rewards and held-out accuracies against steps, as a PNG.

    python benchmarks/curves.py benchmarks/results/smollm2_h200.json --out benchmarks/results/smollm2_h200.png

Reads the files that `five_trainers.py` writes, and trainer_state.json of a run (which `--keep FILE` writes anew with
the curves alone). Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

REWARD, HELD_OUT = "rewards/correct/mean", "eval_rewards/correct/mean"
KEPT = (
    "step", "reward", REWARD, HELD_OUT, "eval_reward", "completions/mean_length", "completions/clipped_ratio", "kl",
    "objective/kl", "entropy", "grad_norm", "rewards/chosen", "rewards/accuracies", "step_time", "time/generate",
    "time/train", "time/sync", "frac_reward_zero_std", "memory/peak_gb", "sampling/sampling_logp_difference/mean",
)  # fmt: skip


def curve(state: dict) -> list[dict]:
    """A log history, with what the curves need."""
    return [{key: entry[key] for key in KEPT if key in entry} for entry in state["log_history"]]


def draw(curves: dict[str, list[dict]], out: Path) -> None:
    """Two pictures side by side: right answers among the sampled ones, and among greedy ones to held-out problems."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name, entries in curves.items():
        rewards = [(e["step"], e[REWARD]) for e in entries if REWARD in e]
        held_out = [(e["step"], e[HELD_OUT]) for e in entries if HELD_OUT in e]
        windows = [[value for _, value in rewards[max(0, i - 4) : i + 1]] for i in range(len(rewards))]
        left.plot([step for step, _ in rewards], [sum(w) / len(w) for w in windows], label=name)
        right.plot(*zip(*held_out, strict=True), marker="o", label=name)
    left.set(xlabel="step", ylabel="right answers, sampled (mean of 5 steps)", ylim=(0, 1))
    right.set(xlabel="step", ylabel="held-out accuracy, greedy", ylim=(0, 1))
    for side in (left, right):
        side.grid(alpha=0.3)
    right.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the PNG")
    parser.add_argument("--name", default="grpo", help="of the run, for a trainer_state.json")
    parser.add_argument("--keep", type=Path, help="write the curves of a trainer_state.json here")
    args = parser.parse_args()
    content = json.loads(args.file.read_text())
    runs = content.get("runs") or {args.name: {"curve": curve(content)}}
    if args.keep:
        args.keep.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    draw({name: run["curve"] for name, run in runs.items()}, args.out)


if __name__ == "__main__":
    main()
