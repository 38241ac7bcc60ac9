"""GRPO here and in TRL: the same rows and the same weights, then the loss and every parameter's gradient compared.

One optimizer step of one micro-batch each, float32 on the CPU, a tiny Qwen2. Runs in an environment that has both
(`make peer` makes it) and fails if anything differs by more than 1e-5:

    .venv-peer/bin/python benchmarks/parity/grpo.py
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import tiny
import torch
import transformers
import trl
from cases import LOSS_TYPES, OPTIONS, REQUIRED, REWARDS, SCALINGS, Option
from sides import EVEN, RAGGED, Result, ours, sampler_logps, scene, theirs

import slipstream

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
# An option that moves the gradient by less than this is not met by these rows, and shows nothing.
LEAST_EFFECT = 5e-4
NOT_YET = "not there yet"
VERSIONS = {
    "slipstream": slipstream.__version__, "trl": trl.__version__, "transformers": transformers.__version__,
    "torch": torch.__version__, "python": platform.python_version(),
}  # fmt: skip


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|; 0 where both are 0."""
    difference = (a - b).norm().item()
    return difference / b.norm().item() if difference else 0.0


def flat(result: Result) -> torch.Tensor:
    """All gradients in one vector."""
    return torch.cat([g.flatten() for _, g in sorted(result.gradients.items())])


def compare(mine: Result, peer: Result) -> dict[str, Any]:
    """Losses and relative differences."""
    if set(mine.gradients) != set(peer.gradients):
        raise RuntimeError(f"only one side has gradients of {set(mine.gradients) ^ set(peer.gradients)}")
    errors = {name: distance(mine.gradients[name], gradient) for name, gradient in peer.gradients.items()}
    worst = max(errors, key=errors.__getitem__)
    # A loss is a sum of terms of both signs and the size of advantages; on-policy it can be 0 by construction.
    scale = max(abs(peer.loss), peer.advantages.abs().mean().item())
    return {
        "loss": mine.loss,
        "trl_loss": peer.loss,
        "loss_error": abs(mine.loss - peer.loss) / scale,
        "loss_error_of_itself": abs(mine.loss - peer.loss) / abs(peer.loss) if peer.loss else None,
        "gradient_error": errors[worst],
        "worst_parameter": worst,
        "advantage_error": distance(mine.advantages, peer.advantages),
    }


def build_moe(path: Path) -> Path:
    """A tiny mixture of experts, with the tiny model's tokenizer."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    vocabulary = tiny.tokenizer()
    config = Qwen2MoeConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        shared_expert_intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=512, tie_word_embeddings=False, output_router_logits=True,
        eos_token_id=vocabulary.eos_token_id, pad_token_id=vocabulary.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(path)
    return path


class Comparison:
    """Runs both sides, and keeps gradients to see that each option changes something."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.outputs = folder / "outputs"
        self.models = {False: tiny.build(folder / "dense"), True: build_moe(folder / "moe")}
        self.seed = seed
        self.seen: dict[tuple[str, str], torch.Tensor] = {}

    def case(self, loss_type: str, name: str, option: Option) -> dict[str, Any]:
        """One cell of the table."""
        settings = {"loss_type": loss_type, **REQUIRED.get(loss_type, {}), **option.settings}
        prompts = RAGGED if option.ragged else EVEN
        rows = scene(self.models[option.moe], tiny.tokenizer(), REWARDS["some not scored"], self.seed, prompts)
        if option.sampled:
            rows.sampler_logps = sampler_logps(rows, settings.get("temperature", 1.0), option.unknown)
        peer = theirs(rows, self.outputs, settings, option.on_policy)
        try:
            mine = ours(rows, self.outputs, settings, option.on_policy)
        except NotImplementedError as error:
            return {"status": NOT_YET, "reason": str(error)}
        found = compare(mine, peer)
        self.seen[loss_type, name] = flat(peer)
        if option.base is not None:
            found["effect"] = distance(self.seen[loss_type, name], self.seen[loss_type, option.base])
            if found["effect"] < LEAST_EFFECT:
                raise RuntimeError(f"{loss_type}, {name}: nothing is other than in {option.base!r} ({found})")
        return _judged(found, ("loss_error", "gradient_error", "advantage_error"))

    def advantages(self, settings: dict[str, Any], rewards: list[list[float | None]]) -> dict[str, Any]:
        """The advantages of one table of rewards."""
        rows = scene(self.models[False], tiny.tokenizer(), rewards, self.seed)
        try:
            mine = ours(rows, self.outputs, settings, True).advantages
        except NotImplementedError as error:
            return {"status": NOT_YET, "reason": str(error)}
        peer = theirs(rows, self.outputs, settings, True).advantages
        return _judged({"advantage_error": distance(mine, peer)}, ("advantage_error",))


def _judged(found: dict[str, Any], errors: tuple[str, ...]) -> dict[str, Any]:
    found["error"] = max(found[name] for name in errors)
    # Written this way round, NaN does not pass.
    found["status"] = "same" if found["error"] <= TOLERANCE else "different"
    return found


def run(folder: Path, seed: int) -> dict[str, Any]:
    """All cases."""
    start, comparison = time.perf_counter(), Comparison(folder, seed)
    losses: dict[str, dict[str, Any]] = {}
    for name, option in OPTIONS.items():
        losses[name] = {kind: comparison.case(kind, name, option) for kind in option.loss_types}
        print(table_row(name, losses[name], LOSS_TYPES), flush=True)
    advantages = {
        name: {kind: comparison.advantages(settings, rewards) for kind, settings in SCALINGS.items()}
        for name, rewards in REWARDS.items()
    }
    seconds = round(time.perf_counter() - start, 1)
    return {
        "versions": VERSIONS, "tolerance": TOLERANCE, "seed": seed, "seconds": seconds,
        "losses": losses, "advantages": advantages,
    }  # fmt: skip


def table_row(name: str, cells: dict[str, Any], columns: tuple[str, ...]) -> str:
    """A row of Markdown."""

    def shown(cell: dict[str, Any] | None) -> str:
        if cell is None:
            return ""
        if cell["status"] == NOT_YET:
            return NOT_YET
        return f"{cell['error']:.0e}" if cell["status"] == "same" else f"**{cell['error']:.0e}**"

    return f"| {name} | " + " | ".join(shown(cells.get(column)) for column in columns) + " |"


def markdown(results: dict[str, Any]) -> str:
    """The page of the documentation."""
    cells = [cell for row in results["losses"].values() for cell in row.values()]
    compared = [cell for cell in cells if cell["status"] != NOT_YET]
    worst = max(cell["error"] for cell in compared)
    cancelled = sum((cell["loss_error_of_itself"] or 0) > TOLERANCE for cell in compared)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())

    def table(rows: dict[str, Any], columns: tuple[str, ...]) -> str:
        head = f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n"
        return head + "\n".join(table_row(name, row, columns) for name, row in rows.items())

    return f"""\
<!-- Generated by benchmarks/parity/grpo.py: `make peer parity`. Do not edit. -->

# The same numbers as TRL

Both GRPO trainers are led through one optimizer step of one micro-batch, on the same prompts, completions, rewards and
weights: each computes advantages, old and reference log-probabilities, masks, the loss and its gradient with its own
code. {len(compared)} cases, float32 on the CPU, a tiny Qwen2 (and a tiny Qwen2-MoE for `router_aux_loss_coef`).

A cell is the largest relative difference between the two: of any one parameter's gradient, |ours - TRL's| / |TRL's|, of
the advantages, or of the loss. (The loss is a sum of terms of both signs and can be 0 by construction; where it is
smaller than the mean |advantage|, the size of its terms, the difference is relative to that. Relative to the loss
itself, {cancelled} of the {len(compared)} exceed {TOLERANCE:.0e}.) The largest of all is {worst:.1e}; more than
{TOLERANCE:.0e} (bold) fails the script. What is left is float32's rounding.

Unless a row says otherwise, the policy has moved on since it sampled and prompts have one length: TRL pads them on the
left, which moves positions, and that rounding is larger than all the rest. An empty cell: the loss type does not have
the option. What a row adds to another changes the gradient by more than {LEAST_EFFECT:.0e}: none agrees because
nothing happened.

With several micro-batches a step the two differ on purpose. Here every normalizer is the whole optimizer step's. In
TRL, `bnpo`, the entropy bonus, the threshold of `top_entropy_quantile` and the balance of experts are each
micro-batch's own, and the token count of `dapo`, `cispo` and `vespo` is the generation batch's, spread evenly over its
steps.

{versions}.

## Losses and gradients

{table(results["losses"], LOSS_TYPES)}

## Advantages

Two weighted reward functions, three groups of four; columns are `scale_rewards`, and GDPO's
`multi_objective_aggregation="normalize_then_sum"`.

{table(results["advantages"], tuple(SCALINGS))}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "parity_grpo.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "parity.md")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the rows")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        results = run(Path(folder), arguments.seed)
    for path, text in ((arguments.json, json.dumps(results, indent=1) + "\n"), (arguments.page, markdown(results))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    failed = 0
    print()
    for table in ("losses", "advantages"):
        for name, row in results[table].items():
            for kind, cell in row.items():
                if cell["status"] != "same":
                    failed += cell["status"] == "different"
                    print(f"{kind}, {name}: {cell}")
    print(f"{failed} cases differ; {results['seconds']} s; {arguments.page}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
