"""Several weighted reward functions: with columns of the dataset, asynchronous, one that leaves rows unscored."""

import asyncio
import os
import re

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import get_soft_overlong_punishment, think_format_reward


def has_digits(completions, **kwargs):
    """Reward digits, in the text of the assistant's message."""
    contents = [completion[0]["content"] for completion in completions]
    return [len(re.findall(r"\d", content)) / 8 for content in contents]


def right_answer(prompts, completions, completion_ids, solution, log_extra=None, log_metric=None, **kwargs):
    """Compare with a column of the dataset, and note things for the logs."""
    assert len(prompts) == len(completions) == len(completion_ids) == len(solution)
    answers = [completion[0]["content"].strip() for completion in completions]
    if log_extra:
        log_extra("gold", list(solution))
    if log_metric:
        log_metric("answered", sum(bool(a) for a in answers) / len(answers))
    return [float(answer == gold) for answer, gold in zip(answers, solution, strict=True)]


def only_math(completions, task, trainer_state=None, **kwargs):
    """Not applicable to the other tasks: None."""
    assert trainer_state is None or trainer_state.global_step >= 0
    return [float("+" in c[0]["content"]) if t == "math" else None for c, t in zip(completions, task, strict=True)]


async def slow_judge(prompts, completions, **kwargs):
    """Wait for every completion at the same time, as a remote judge would be waited for."""

    async def judge(completion):
        await asyncio.sleep(0.01)
        return float(len(completion[0]["content"]) > 2)

    return await asyncio.gather(*(judge(completion) for completion in completions))


def to_chat(example):
    question = [{"role": "system", "content": "Add."}, {"role": "user", "content": example["question"]}]
    return {"prompt": question}


def main():
    dataset = load_dataset(os.environ["DATASET"], split="train").map(to_chat, remove_columns=["question"])
    overlong = get_soft_overlong_punishment(max_completion_len=8, soft_punish_cache=4)
    training_args = GRPOConfig(
        output_dir=os.environ["OUTPUT"],
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        num_generations=4,
        max_completion_length=8,
        temperature=0.9,
        reward_weights=[1.0, 2.0, 0.5, 0.25, 0.1, 1.0],
        loss_type="dr_grpo",
        scale_rewards=False,
        mask_truncated_completions=False,
        use_vllm=True,
        vllm_max_model_length=96,
        chat_template_kwargs={"enable_thinking": False},
        max_steps=2,
        logging_steps=1,
        log_completions=True,
        num_completions_to_print=2,
        report_to="none",
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model=os.environ["MODEL"],
        reward_funcs=[has_digits, right_answer, only_math, slow_judge, think_format_reward, overlong],
        args=training_args,
        train_dataset=dataset,
    )
    trainer.train()
    trainer.save_state()
    trainer.save_model()


if __name__ == "__main__":
    main()
