"""One rank of a run in which the model calls tools, started by torchrun. Its first half of the prompts calls none.

Arguments: the model, the output folder, settings as JSON, and `sharded` or `whole`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

TURNS: list[int] = []
"""Requests of each of this rank's calls to its engine."""


def length(completions, **_):
    return [float(len(str(messages))) for messages in completions]


def main() -> None:
    import calling
    from datasets import Dataset
    from run_sharded import SHARDED, allow_on_cpus

    from slipstream import GRPOConfig, GRPOTrainer
    from slipstream.generation.engine import EngineLostError

    model, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    if sys.argv[4] == "sharded":
        os.environ |= SHARDED
        allow_on_cpus()
    lose = settings.pop("lose", None)  # which of rank 1's calls to its engine fails as if a server were lost
    rows = [calling.ROWS[i] for i in (0, 0, 0, 2, 1, 2)]
    settings = {"use_cpu": True, "per_device_train_batch_size": 6} | settings
    args = GRPOConfig(
        output_dir=str(folder), vllm_max_model_length=256, max_completion_length=130, num_generations=2,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, html_report=False, optim="sgd",
        learning_rate=0.1, shuffle_dataset=False, gradient_checkpointing=False, eval_strategy="steps", eval_steps=2,
        max_steps=2, temperature=1.1, **settings,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, length, args, Dataset.from_list(rows), Dataset.from_list(rows[1:]),
        processing_class=calling.tokenizer(), tools=[calling.add],
    )  # fmt: skip
    generate = trainer.engine.generate

    def noted(requests, *arguments, **options):
        TURNS.append(len(requests))
        if args.process_index == 1 and len(TURNS) == lose:
            raise EngineLostError("lost by the test")
        return generate(requests, *arguments, **options)

    trainer.engine.generate = noted
    trainer.engine.recover = lambda: None
    trainer.train()
    trainer.save_model()
    (folder / f"rank{args.process_index}.json").write_text(json.dumps([trainer.state.log_history, TURNS]))
    trainer.close()


if __name__ == "__main__":
    from slipstream.lifetime import leave_process_group

    main()
    leave_process_group()
