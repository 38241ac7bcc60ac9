"""One rank of several runs of GRPO, started by torchrun: with weights divided over the ranks (FSDP2) or whole ones.

Arguments: the model, a reward model, the output folder, `sharded` or `whole`, and the names of the runs.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

SHARDED = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}  # fmt: skip
"""What `accelerate launch` sets for a config with FSDP2."""

COMMON = {
    "vllm_max_model_length": 64, "max_completion_length": 8, "num_generations": 4, "per_device_train_batch_size": 6,
    "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "html_report": False,
    "optim": "sgd", "learning_rate": 1.0, "max_steps": 2, "use_cpu": True, "use_vllm": True, "beta": 0.5,
}  # fmt: skip
RUNS = {
    # Micro-batches of one row of tokens each, so that several passes add to the gradients.
    "full": {"max_tokens_per_micro_batch": 64, "eval_strategy": "steps", "eval_steps": 2},
    "lora": {},
    "transformers": {"use_vllm": False, "vllm_max_model_length": None, "max_completion_length": 300},
    "lora-transformers": {"use_vllm": False, "vllm_max_model_length": None, "max_completion_length": 300},
    "saved": {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-3},
    "resumed": {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-3},
}


def allow_on_cpus() -> None:
    """Let accelerate divide weights over ranks without accelerators, which it does not offer."""
    from accelerate import state
    from accelerate.utils import DistributedType

    made = state.AcceleratorState.__init__
    given = []

    @functools.wraps(made)
    def with_fsdp(self, *args, fsdp_plugin=None, **options):
        made(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            given[:] = [fsdp_plugin]
        if given:  # every instance writes to what all share
            self.distributed_type, [self.fsdp_plugin] = DistributedType.FSDP, given

    state.AcceleratorState.__init__ = with_fsdp


def digits(prompts, completions, **_):
    return [sum(c.isdigit() for c in m[0]["content"]) / 8 for m in completions]


def train(name, model, reward_model, folder) -> None:
    import pytest
    from datasets import Dataset
    from peft import LoraConfig

    from slipstream import GRPOConfig, GRPOTrainer

    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{a}+{b}=?"}]} for a in range(8) for b in "135"])
    out = folder / ("saved" if name == "resumed" else name)
    args = GRPOConfig(output_dir=str(out), **COMMON | RUNS[name])
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian") if "lora" in name else None
    trainer = GRPOTrainer(model, [digits, reward_model], args, rows, rows.select(range(5)), peft_config=adapter)
    if name == "full" and trainer.is_fsdp_enabled:
        with pytest.raises(RuntimeError, match="evaluate\\(\\) before train\\(\\) does not go with FSDP"):
            trainer.evaluate()
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-1") if name == "resumed" else None)
    trainer.save_model(str(folder / name))
    if args.process_index == 0:
        (folder / name / "history.json").write_text(json.dumps(trainer.state.log_history))
        (folder / name / "packed.json").write_text(json.dumps(trainer.packer.packed))
    trainer.close()


def main() -> None:
    model, reward_model, folder, kind, *names = sys.argv[1:]
    if kind == "sharded":
        os.environ.update(SHARDED)
        allow_on_cpus()
    for name in names:
        train(name, model, reward_model, Path(folder))


if __name__ == "__main__":
    main()
    from slipstream.lifetime import leave_process_group

    leave_process_group()
