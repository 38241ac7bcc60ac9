"""One rank of a run on prompts with and without images, started by torchrun; saves its log as JSON and its model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from slipstream.lifetime import leave_process_group


def vowels(completions, **_):
    return [float(sum(c in "aeiou" for c in message[0]["content"])) for message in completions]


def main() -> None:
    """Arguments: the model, the output folder, and the completions of a rank."""
    import tiny_vision
    from datasets import Dataset

    from slipstream import GRPOConfig, GRPOTrainer

    model, folder, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    sizes, question = [(24, 24), (48, 24), (24, 48)], [{"role": "user", "content": "What is it?"}]
    # The second of two ranks has images alone in the first step, none in the second, and some in the third.
    seen = [0, 0, 2, 1, 1, 1, 0, 0, 1, 0, 0, 2]
    rows = [
        {"prompt": question, "images": [tiny_vision.picture((20 * i, 200 - 10 * i, 90), sizes[i % 3])] * count}
        for i, count in enumerate(seen)
    ]
    args = GRPOConfig(
        output_dir=str(folder), use_vllm=True, vllm_max_model_length=256, max_completion_length=8, num_generations=4,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, html_report=False, optim="sgd",
        learning_rate=0.2, max_steps=3, shuffle_dataset=False, per_device_train_batch_size=size, beta=0.1,
        eval_strategy="steps", eval_steps=3, num_generations_eval=1,
    )  # fmt: skip
    trainer = GRPOTrainer(model, vowels, args, Dataset.from_list(rows), Dataset.from_list(rows[:5]))
    trainer.train()
    trainer.save_model()
    if args.process_index == 0:
        (folder / "history.json").write_text(json.dumps(trainer.state.log_history))
    trainer.close()


if __name__ == "__main__":
    main()
    leave_process_group()
