"""The smallest script: a model's name, a dataset's name, a ready reward function."""

import os

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import accuracy_reward

dataset = load_dataset(os.environ.get("DATASET", "trl-lib/DeepMath-103K"), split="train")

training_args = GRPOConfig(
    output_dir=os.environ.get("OUTPUT", "Qwen3-0.6B-GRPO"),
    use_vllm=True,
    vllm_mode="colocate",
    vllm_gpu_memory_utilization=0.3,
    vllm_max_model_length=96,
    max_completion_length=8,
    max_steps=2,
    logging_steps=1,
)

trainer = GRPOTrainer(
    model=os.environ.get("MODEL", "Qwen/Qwen3-0.6B"),
    reward_funcs=accuracy_reward,
    args=training_args,
    train_dataset=dataset,
)
trainer.train()
trainer.save_model(training_args.output_dir)
