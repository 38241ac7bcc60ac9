"""An adapter, a KL penalty, several updates a generation batch, evaluation, and a model that is loaded beforehand."""

import os

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def reward_digits(completions, **kwargs):
    return [float(sum(character.isdigit() for character in completion)) for completion in completions]


class CountEvaluations(TrainerCallback):
    evaluations = 0

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluations += 1


if __name__ == "__main__":
    splits = load_dataset(os.environ["DATASET"], split="train").train_test_split(test_size=4, seed=0)
    splits = splits.rename_column("question", "prompt")
    tokenizer = AutoTokenizer.from_pretrained(os.environ["MODEL"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(os.environ["MODEL"], dtype="float32")
    counter = CountEvaluations()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[reward_digits],
        args=GRPOConfig(
            output_dir=os.environ["OUTPUT"],
            learning_rate=1e-3,
            beta=0.04,
            num_iterations=2,
            epsilon=0.2,
            epsilon_high=0.28,
            scale_rewards="batch",
            num_generations=4,
            num_generations_eval=2,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            max_completion_length=8,
            use_vllm=True,
            vllm_max_model_length=96,
            vllm_importance_sampling_mode="token_truncate",
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            max_steps=4,
            logging_steps=1,
            seed=7,
        ),
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=tokenizer,
        callbacks=[counter],
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    trainer.log_metrics("eval", trainer.evaluate())
    assert counter.evaluations == 3, counter.evaluations
