"""Draw docs/performance.png, a decode step and a training pass on a GPU, and docs/steps.png, whole steps beside TRL's:
before and after, by where the time goes, against their floors.

    python benchmarks/performance_picture.py        # needs matplotlib

A floor is the larger of two times: the operations that are needed over the card's measured rate of bfloat16 products,
and the bytes that must be read over its measured bandwidth.
"""

from __future__ import annotations

import argparse
from typing import Any

import flops
import torch
from shapes import SHAPES
from tables import ROOT, results
from transformers import AutoModelForCausalLM

from slipstream.records import Completion, Prompt, Rollout

BANDWIDTH = 4.3e12  # bytes a second of a copy on an H200, read and written ones counted
# Qwen2-1.5B's shape: parameters, and bytes of keys and values of a token (28 layers, 2 heads of 128, bfloat16).
PARAMETERS, CACHE = 1.54e9, 28 * 2 * 2 * 128 * 2
STEPS = {
    "trl": "as TRL asks", "flat": "vLLM's flat lists", "each": "none, vLLM's scheduling", "ours": "Slipstream",
    "none": "Slipstream, none",
}  # fmt: skip
OURS = {"Slipstream", "Slipstream, none", "or prompts shared"}
WHOLE = {
    "step_time_h200_1.5b_512": ("qwen2-1.5b", "1.5B, 512 completions of 512 tokens, H200"),
    "step_time_h200_135m_128": ("smollm2-135m", "SmolLM2-135M, 128 completions, H200"),
}
PHASES = {
    ("generate",): ("generation", "tab:blue"),
    ("forward", "train"): ("training", "tab:orange"),
    ("score", "rest"): ("rewards and the rest", "tab:gray"),
    ("sync",): ("weights", "tab:green"),
}
PASSES = {
    "way=packed,tokens=16384,gradient_checkpointing=on": "packed, float32,\ncheckpointing",
    "way=packed,tokens=16384,gradient_checkpointing=off": "packed, float32",
    "way=packed,tokens=16384,gradient_checkpointing=off,weights=bfloat16": "packed, bfloat16",
    "way=packed,tokens=16384,gradient_checkpointing=off,weights=bfloat16,compile=parts": "and parts compiled",
    "way=packed,tokens=16384,gradient_checkpointing=off,weights=bfloat16,liger=on": "or liger kernels",
    "way=shared,tokens=16384,gradient_checkpointing=off,weights=bfloat16": "or prompts shared",
}


def decode_floor(options: dict[str, Any], rate: float) -> float:
    """Milliseconds that a decode step of all sequences takes at least."""
    sequences = options["prompts"] * options["completions"]
    context = options["prompt_tokens"] + options["tokens"] / 2
    reading = (2 * PARAMETERS + sequences * context * CACHE) / BANDWIDTH
    return 1000 * max(reading, 2 * PARAMETERS * sequences / rate)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sampled, trained = results("generation_h200"), results("training_sweep_h200")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4))
    floor = decode_floor(sampled["options"], trained["matrix_flops_per_second"])
    bars(left, {STEPS[w]: sampled["ms_per_step"][w] for w in STEPS}, [floor] * len(STEPS), "{:.1f} ms")
    left.set_title("A decode step, 512 sequences, 1.5B, H200", fontsize=10)
    left.set_xlabel("milliseconds")
    rows = {name: trained["sweep"][setting] for setting, name in PASSES.items()}
    floors = [row["seconds"] * row["utilization"] for row in rows.values()]
    bars(right, {name: row["seconds"] for name, row in rows.items()}, floors, "{:.2f} s")
    right.set_title("A training pass, 128 completions, 1.5B, H200", fontsize=10)
    right.set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "performance.png", dpi=110)
    draw_steps(pyplot, trained["matrix_flops_per_second"])


def step_floor(found: dict[str, Any], shape: str, rate: float) -> dict[str, float]:
    """Seconds that generation and training of a step take at least."""
    config, settings, ours = SHAPES[shape], found["settings"], found["sides"]["ours"]
    heads = config.num_attention_heads
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    cache = config.num_hidden_layers * 2 * config.num_key_value_heads * (config.hidden_size // heads) * 2
    prompt, length, count = ours["prompt_tokens"], round(ours["mean_length"]), settings["completions"]
    # Every step reads the weights, and each sequence's keys and values as long as it lasts.
    reading = settings["max_tokens"] * 2 * parameters + count * length * (prompt + length / 2) * cache
    generating = max(reading / BANDWIDTH, 2 * parameters * count * length / rate)
    rollouts = [
        Rollout(Prompt([0] * prompt, {}, i // settings["group"]), Completion([0] * length, None, 0, "stop"), "", False)
        for i in range(count)
    ]
    return {"generate": generating, "train": flops.needed(config, parameters, rollouts, prompts_once=False) / rate}


def draw_steps(pyplot: Any, rate: float) -> None:
    """Whole steps, by phase."""
    figure, places = pyplot.subplots(1, 2, figsize=(12, 2.6))
    for axes, (file, (shape, text)) in zip(places, WHOLE.items(), strict=True):
        found = results(file)
        rows = {"TRL 1.16": found["sides"]["trl"]["phases"], "Slipstream": found["sides"]["ours"]["phases"]}
        rows["floor"] = step_floor(found, shape, rate)
        start = [0.0] * len(rows)
        for phases, (name, color) in PHASES.items():
            seconds = [sum(row.get(phase, 0.0) for phase in phases) for row in rows.values()]
            axes.barh(list(rows), seconds, left=start, label=name, color=color)
            start = [a + b for a, b in zip(start, seconds, strict=True)]
        for i, total in enumerate(start):
            axes.text(total, i, f" {total:.2f} s", va="center", fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(f"A step of GRPO, {text}", fontsize=10)
        axes.set_xlabel("seconds")
    places[0].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "steps.png", dpi=110)


def bars(axes: Any, values: dict[str, float], floors: list[float], form: str) -> None:
    """A bar for each value, with a mark where its floor is."""
    axes.barh(
        list(values), list(values.values()), color=["tab:blue" if name in OURS else "tab:gray" for name in values]
    )
    for i, (value, floor) in enumerate(zip(values.values(), floors, strict=True)):
        axes.plot([floor, floor], [i - 0.4, i + 0.4], color="tab:red", label="floor" if i == 0 else None)
        axes.text(value, i, " " + form.format(value), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.legend(loc="lower right")


if __name__ == "__main__":
    main()
