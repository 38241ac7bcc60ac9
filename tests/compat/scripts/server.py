"""Server mode as it is documented: a server was started before, and `accelerate launch` starts this."""

import os

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import accuracy_reward

dataset = load_dataset(os.environ.get("DATASET", "trl-lib/DeepMath-103K"), split="train")

trainer = GRPOTrainer(
    model=os.environ.get("MODEL", "Qwen/Qwen2.5-7B"),
    args=GRPOConfig(
        output_dir=os.environ.get("OUTPUT", "my_test"),
        use_vllm=True,
        vllm_mode="server",
        vllm_server_host="0.0.0.0",
        vllm_server_port=int(os.environ.get("PORT", "8000")),
        max_completion_length=8,
        max_steps=2,
        logging_steps=1,
    ),
    reward_funcs=accuracy_reward,
    train_dataset=dataset,
)
trainer.train()
trainer.save_model()
