"""One rank of a run of each trainer but GRPO, started by torchrun; each saves its log as JSON and its model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from slipstream.lifetime import leave_process_group


def digits(completions, **_):
    """The share of digits; some completions are not scored, so that ranks keep different numbers of pairs."""
    return [None if text.count("a") else sum(c.isdigit() for c in text) / 8 for text in completions]


def main() -> None:
    """Arguments: the model, the output folder, and how many prompts a rank takes at a time."""
    from datasets import Dataset

    import slipstream

    model, folder, prompts = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    rows = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)])
    # A rank may have one and a half of RLOO's groups of four.
    sizes = {"RLOO": 2 * prompts, "OnlineDPO": prompts, "NashMD": prompts, "XPO": prompts}
    for name, size in sizes.items():
        given = {"num_generations": 4} if name == "RLOO" else {}
        args = getattr(slipstream, f"{name}Config")(
            output_dir=str(folder / name), use_vllm=True, vllm_max_model_length=64, max_completion_length=8,
            logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, html_report=False, optim="sgd",
            learning_rate=0.2, gradient_checkpointing=False, use_cpu=True, max_steps=2, beta=0.1,
            eval_strategy="steps", eval_steps=2, per_device_train_batch_size=size, **given,
        )  # fmt: skip
        trainer = getattr(slipstream, f"{name}Trainer")(
            model, reward_funcs=digits, args=args, train_dataset=rows, eval_dataset=rows.select(range(7))
        )
        trainer.train()
        trainer.save_model()
        if args.process_index == 0:
            (folder / name / "history.json").write_text(json.dumps(trainer.state.log_history))
        trainer.close()


if __name__ == "__main__":
    main()
    leave_process_group()
