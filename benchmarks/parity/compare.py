"""What every comparison with TRL shares: models, the differences that count, the results' file and the command line."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import page
import tiny
import torch
import transformers
import trl
from sides import EVEN, Result, Scene, make_scene

import slipstream

ROOT = Path(__file__).parents[2]
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


def differences(mine: Result, peer: Result) -> dict[str, Any]:
    """Losses and relative differences."""
    if set(mine.gradients) != set(peer.gradients):
        raise RuntimeError(f"only one side has gradients of {set(mine.gradients) ^ set(peer.gradients)}")
    errors = {name: distance(mine.gradients[name], gradient) for name, gradient in peer.gradients.items()}
    worst = max(errors, key=errors.__getitem__)
    # A loss is a sum of terms of both signs and the size of advantages; on-policy it can be 0 by construction.
    scale = abs(peer.loss) if peer.advantages is None else max(abs(peer.loss), peer.advantages.abs().mean().item())
    found = {
        "loss": mine.loss,
        "trl_loss": peer.loss,
        "loss_error": abs(mine.loss - peer.loss) / scale,
        "loss_error_of_itself": abs(mine.loss - peer.loss) / abs(peer.loss) if peer.loss else None,
        "gradient_error": errors[worst],
        "worst_parameter": worst,
    }
    if mine.advantages is not None and peer.advantages is not None:
        found["advantage_error"] = distance(mine.advantages, peer.advantages)
    return found


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
    """Leads both sides through cases, and keeps gradients to see that each option changes something.

    Attributes:
        outputs: A folder for what trainers write.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.outputs = folder / "outputs"
        self._models = {False: tiny.build(folder / "dense"), True: build_moe(folder / "moe")}
        self._seed = seed
        self._seen: dict[tuple[str, str], torch.Tensor] = {}

    def scene(
        self, rewards: list[list[float | None]], prompts: tuple[str, ...] = EVEN, *, group: int = 4, moe: bool = False
    ) -> Scene:
        """Rows with these rewards, on a model of experts or a dense one."""
        return make_scene(self._models[moe], tiny.tokenizer(), rewards, self._seed, prompts, group)

    def case(
        self, column: str, row: str, base: str | None, theirs: Callable[[], Result], ours: Callable[[], Result]
    ) -> dict[str, Any]:
        """One cell of the table of losses; `base` is the row that this one adds something to."""
        peer = theirs()
        try:
            mine = ours()
        except NotImplementedError as error:
            return {"status": page.NOT_YET, "reason": str(error)}
        found = differences(mine, peer)
        self._seen[column, row] = flat(peer)
        if base is not None:
            found["effect"] = distance(self._seen[column, row], self._seen[column, base])
            if found["effect"] < page.LEAST_EFFECT:
                raise RuntimeError(f"{column}, {row}: nothing is other than in {base!r} ({found})")
        return judged(found)

    @staticmethod
    def advantages(theirs: Callable[[], Result], ours: Callable[[], Result]) -> dict[str, Any]:
        """One cell of the table of advantages."""
        try:
            mine = ours()
        except NotImplementedError as error:
            return {"status": page.NOT_YET, "reason": str(error)}
        return judged({"advantage_error": distance(mine.advantages, theirs().advantages)})


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """With the largest error, and whether it is small enough."""
    names = ("loss_error", "gradient_error", "advantage_error")
    found["error"] = max(found[name] for name in names if name in found)
    # Written this way round, NaN does not pass.
    found["status"] = "same" if found["error"] <= page.TOLERANCE else "different"
    return found


def main(name: str, description: str, run: Callable[[Comparison], dict[str, Any]]) -> None:
    """Compare, write `parity_{name}.json` and the page that shows what is in its folder, and exit."""
    results_folder = ROOT / "benchmarks" / "results"
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=results_folder / f"parity_{name}.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "parity.md")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the rows")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        tables = run(Comparison(Path(folder), arguments.seed))
    seconds = round(time.perf_counter() - start, 1)
    results = {
        "versions": VERSIONS, "tolerance": page.TOLERANCE, "seed": arguments.seed, "seconds": seconds, **tables,
    }  # fmt: skip
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(page.markdown({name: results} | page.read(arguments.json.parent, without=name)))
    failed = 0
    print()
    for table in tables.values():
        for row, cells in table.items():
            for column, cell in cells.items():
                if cell["status"] != "same":
                    failed += cell["status"] == "different"
                    print(f"{column}, {row}: {cell}")
    print(f"{failed} cases differ; {seconds} s; {arguments.page}")
    sys.exit(1 if failed else 0)
