"""A run that can be stopped and resumed. As a script: trains, and kills itself once its first checkpoint is there."""

from __future__ import annotations

import json
import os
import signal
import sys

from slipstream.lifetime import leave_process_group

ROWS = [
    {"prompt": [{"role": "user", "content": f"{a}+{b}=?"}], "solution": str(a + b)} for a in range(8) for b in range(8)
]


def digits(completions, **_):
    """The share of digits: something a random model can learn within seconds."""
    return [sum(c.isdigit() for c in m[0]["content"]) / 8 for m in completions]


def make(model, folder, *, trainer="GRPO", rows=64, adapter=False, callbacks=None, **values):
    """A trainer of ten steps that saves a checkpoint after the fifth; with `adapter`, of one with dropout.

    `trainer` is its name as in `slipstream.{name}Trainer`.
    """
    from datasets import Dataset

    import slipstream

    settings = {
        "use_vllm": False, "vllm_max_model_length": 64, "max_completion_length": 8, "per_device_train_batch_size": 16,
        "max_steps": 10, "logging_steps": 1, "learning_rate": 3e-3, "report_to": [],
        "gradient_checkpointing": False, "save_strategy": "steps", "save_steps": 5, "disable_tqdm": True,
        "html_report": False,
    } | values  # fmt: skip
    if trainer in ("GRPO", "RLOO"):  # the others have pairs
        settings.setdefault("num_generations", 4)
    args, peft_config = getattr(slipstream, f"{trainer}Config")(output_dir=str(folder), **settings), None
    if adapter:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    train, evaluate = Dataset.from_list(ROWS[:rows]), Dataset.from_list(ROWS[:4])
    return getattr(slipstream, f"{trainer}Trainer")(
        model, reward_funcs=digits, args=args, train_dataset=train, eval_dataset=evaluate, peft_config=peft_config,
        callbacks=callbacks,
    )  # fmt: skip


def main() -> None:
    """Arguments: the model, the output folder, arguments of `make` as JSON, and "kill", "resume" or "leave"."""
    import torch
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            os.kill(os.getpid(), signal.SIGKILL)

    model, folder, settings, fate = sys.argv[1:]
    trainer = make(model, folder, callbacks=[Kill()] if fate == "kill" else None, **json.loads(settings))
    trainer.train(resume_from_checkpoint=fate == "resume")
    trainer.save_model()
    with open(os.path.join(folder, f"history{trainer.args.process_index}.json"), "w") as out:
        json.dump(trainer.state.log_history, out)
    trainer.close()
    leave_process_group()


if __name__ == "__main__":
    main()
