"""One rank of a GRPO run, started by torchrun: trains a few steps and saves what came out as JSON and a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from slipstream.lifetime import leave_process_group

SEEN: list[tuple[int, str, list[int]]] = []
"""What was sampled: step, prompt, token ids."""
ASKED: list[int] = []
"""Completions that each of this rank's calls to its engine asked for."""


def digits(prompts, completions, completion_ids, trainer_state, **_):
    asked = [messages[0]["content"] for messages in prompts]
    SEEN.extend((trainer_state.global_step, *found) for found in zip(asked, completion_ids, strict=True))
    return [sum(c.isdigit() for c in m[0]["content"]) / 8 for m in completions]


def main() -> None:
    from datasets import Dataset

    from slipstream import GRPOConfig, GRPOTrainer

    model, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    rows = [{"prompt": [{"role": "user", "content": f"{a}+{b}=?"}]} for a in range(8) for b in range(8)]
    args = GRPOConfig(
        output_dir=str(folder), use_vllm=True, vllm_max_model_length=64, max_completion_length=8, num_generations=4,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
        html_report=False, optim="sgd", learning_rate=1.0, eval_temperature=0.0, num_generations_eval=1,
        eval_strategy="steps", eval_steps=2, **{"gradient_checkpointing": False} | settings,
    )  # fmt: skip
    trainer = GRPOTrainer(model, digits, args, Dataset.from_list(rows), Dataset.from_list(rows[:7]))
    generate = trainer.engine.generate

    def noted(requests, *arguments, **options):
        found = generate(requests, *arguments, **options)
        ASKED.append(sum(request.n for request in requests))  # once, also where it had to be asked for again
        return found

    trainer.engine.generate = noted
    trainer.train()
    trainer.save_model()
    (folder / f"rank{args.process_index}.json").write_text(json.dumps(trainer.state.log_history))
    (folder / f"sampled{args.process_index}.json").write_text(json.dumps(sorted(SEEN)))
    (folder / f"asked{args.process_index}.json").write_text(json.dumps(ASKED))
    found = {}
    for name, values in {"binary": (1.0, 0.0), "half on one": (1.0, 0.5)}.items():
        mine = values[args.process_index]
        trainer.rewards.functions = [lambda completions, mine=mine, **_: [mine] * len(completions)]
        trainer.evaluate()
        found[name] = trainer.rewards_are_binary
    (folder / f"binary{args.process_index}.json").write_text(json.dumps(found))
    trainer.close()


if __name__ == "__main__":
    main()
    leave_process_group()
