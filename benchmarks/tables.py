"""The tables of measurements in README.md and docs/performance.md, made of benchmarks/results.

    python benchmarks/tables.py            # writes them; tests/unit/test_tables.py finds one that is not up to date

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/performance.md")
WAYS = {  # those that a file has are shown
    "trl": "as TRL asks: a request a completion, text and an object for each token",
    "flat": "one request a prompt, vLLM's flat lists of log-probabilities",
    "each": "no log-probabilities, every sequence scheduled by itself",
    "apart": "Slipstream, with log-probabilities, a prompt read for each of its completions",
    "ours": "**Slipstream**, with log-probabilities",
    "none": "Slipstream, without",
}


def results(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown; the columns behind the first are numbers."""
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed() -> str:
    """What was measured beside something else in one run."""
    rows = []

    def add(what: str, file: str, other: str, theirs: float, ours: float, unit: str = "s") -> None:
        name = f"[{what}](benchmarks/results/{file}.json)"
        rows.append((name, other, f"{theirs:.2f} {unit}", f"{ours:.2f} {unit}", f"**{theirs / ours:.1f}**"))

    for file, where in (
        ("generation_h200", "1.5B parameters, 512 completions of 512 tokens, H200"),
        ("generation_h200_1000", "1.5B parameters, 128 completions of 256 tokens, 1000-token prompts, H200"),
        ("generation_cpu", "1M parameters, 64 completions of 48 tokens, two CPU cores"),
    ):
        seconds = results(file)["median_seconds"]
        what = f"Generation with log-probabilities, {where}"
        add(what, file, "vLLM, asked as TRL asks", seconds["trl"], seconds["ours"])
    for tokens in (128, 1000):
        ways = results(f"training_step_h200_{tokens}")["ways"]
        what = f"Training pass, 1.5B parameters, 64 completions of {tokens}-token prompts, H200"
        theirs, ours = ways["padded, whole"]["seconds"], ways["shared, chunked"]["seconds"]
        add(what, f"training_step_h200_{tokens}", "padded rows, whole logits", theirs, ours)
    for file, text in STEPS.items():
        found = results(file)
        seconds = {side: measured["step_seconds"] for side, measured in found["sides"].items()}
        add(f"Step of GRPO, {text}, {card(found)}", file, "TRL 1.16", seconds["trl"], seconds["ours"])
        if "liger" in seconds:
            add("The same, both with Liger's kernels", file, "TRL 1.16", seconds["trl-liger"], seconds["liger"])
    found = results("weight_push_h100")
    for pushed in found["shapes"].values():
        what = f"Pushing {pushed['push']['bytes'] / 1e9:.1f} GB to a server's engine, from one {card(found)} to another"
        theirs, ours = min(pushed["trl"]["seconds"]), min(pushed["push"]["seconds"])
        add(what, "weight_push_h100", "TRL 1.16", theirs, ours)
    sides = results("step_time_cpu")["sides"]
    what = "Step of GRPO with transformers' generation, two CPU cores"
    add(what, "step_time_cpu", "TRL 1.16", sides["trl"]["step_seconds"], sides["ours"]["step_seconds"])
    return table(("", "beside", "theirs", "ours", "times as fast"), rows)


def generation(file: str = "generation_h200") -> str:
    """The ways of asking vLLM, on a GPU."""
    found = results(file)
    rows = [
        (text, f"{found['median_seconds'][way]:.2f}", f"{found['ms_per_step'][way]:.2f}", f"{ratio:.2f}")
        for way, text in WAYS.items()
        if way in found["median_seconds"]
        for ratio in [found["ratio_to_none"][way]]
    ]
    return table(("", "seconds", "ms a decode step", "ratio to the last"), rows)


def long_prompts() -> str:
    """The same with prompts that are worth reading once."""
    return generation("generation_h200_1000")


def training() -> str:
    """Settings of the training pass, on a GPU."""
    rows = []
    for row in results("training_sweep_h200")["sweep"].values():
        setting = row["setting"]
        rows.append(
            (
                "prompts shared" if setting["way"] == "shared" else setting["way"],
                f"{setting['tokens']:,}", setting["weights"], setting["gradient_checkpointing"], setting["compile"],
                setting["liger"], f"{row['seconds']:.2f}", f"{row['utilization']:.0%}", f"{row['peak_gib']:.0f}",
            )
        )  # fmt: skip
    head = (
        "rows", "tokens of a micro-batch", "weights", "checkpointing", "compiled", "liger", "seconds", "utilization",
        "peak GiB",
    )  # fmt: skip
    return table(head, rows)


STEPS = {
    "step_time_h200_135m_128": "SmolLM2-135M, 128 completions of natural length",
    "step_time_h100_135m_512": "SmolLM2-135M, 512 completions of natural length",
    "step_time_h200_1.5b_512": "1.5B parameters, 512 completions of 512 tokens",
    "step_time_h200_1.5b_1000": "1.5B parameters, 128 completions of 512 tokens, 1000-token prompts",
}
SIDES = {
    "trl": "TRL 1.16", "trl-liger": "TRL 1.16, Liger", "ours": "**Slipstream**", "liger": "**Slipstream**, Liger",
}  # fmt: skip


def card(found: dict[str, Any]) -> str:
    """H200, of NVIDIA H200."""
    return str(found["device"].split()[1])


def steps() -> str:
    """Whole steps beside TRL's, on a GPU."""
    rows = []
    for file, what in STEPS.items():
        measured = results(file)
        sides, device = measured["sides"], card(measured)
        for side, name in SIDES.items():
            if side not in sides:
                continue
            found = sides[side]
            training = found["phases"]["forward"] + found["phases"]["train"]
            rows.append(
                (
                    f"{what}, {device}" if side == "trl" else "", name,
                    f"{found['step_seconds']:.2f}", f"{found['phases']['generate']:.2f}", f"{training:.2f}",
                    f"{found['phases']['sync']:.3f}", f"{found['peak_gib']:.0f}", f"{found['mean_length']:.0f}",
                    f"{sides['trl']['step_seconds'] / found['step_seconds']:.1f}",
                )
            )  # fmt: skip
    head = (
        "a step of GRPO", "", "seconds", "generation", "training", "sync", "peak GiB", "mean tokens", "times as fast",
    )  # fmt: skip
    return table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "speed": speed, "generation": generation, "long_prompts": long_prompts, "training": training, "steps": steps,
}  # fmt: skip


def filled(text: str) -> str:
    """A page with its tables as they are now."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n<!-- end -->"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text()))
        print(f"{page}: {len(re.findall(r'<!-- table: ', path.read_text()))} tables")


if __name__ == "__main__":
    main()
