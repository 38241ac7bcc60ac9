"""What the tests of RLOO, Online DPO, Nash-MD and XPO share: rows, a reward, trainers that need no vLLM."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

import slipstream

ROWS = [{"prompt": f"{a}+{b}=", "solution": str(a + b)} for a in range(4) for b in range(4)]
PAIRWISE = ["OnlineDPO", "NashMD", "XPO"]
ALL = ["RLOO", *PAIRWISE]


def digits(completions, **_):
    """The share of digits."""
    return [sum(c.isdigit() for c in text) / 8 for text in completions]


def make(name, model, folder, *, rows=ROWS, evaluate=None, arguments=None, **values):
    """A trainer of one of `ALL`: eight completions a step, of which two belong to a prompt."""
    settings = {
        "max_completion_length": 8, "per_device_train_batch_size": 8 if name == "RLOO" else 4, "max_steps": 2,
        "logging_steps": 1, "learning_rate": 1e-2, "report_to": [], "gradient_checkpointing": False,
        "save_strategy": "no", "disable_tqdm": True, "html_report": False,
    } | values  # fmt: skip
    given = {
        "reward_funcs": digits, "args": getattr(slipstream, f"{name}Config")(output_dir=str(folder), **settings),
    } | (arguments or {})  # fmt: skip
    return getattr(slipstream, f"{name}Trainer")(
        model, train_dataset=Dataset.from_list(rows), eval_dataset=evaluate and Dataset.from_list(evaluate), **given
    )


def load(folder):
    """The model in a folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def weights(model):
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def history(trainer, name):
    """The values of a metric, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def sample(trainer):
    """The rollouts of the first generation batch."""
    return trainer._sample_batch(next(iter(trainer._sampler))[0])


def gradient(trainer, rollouts=None):
    """The loss of these rows, or of the first generation batch, and its gradient in one vector."""
    rollouts = sample(trainer) if rollouts is None else rollouts
    trainer.model.zero_grad()
    loss, _ = trainer._learn(trainer.model, rollouts)
    return loss, torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


class Gradients(TrainerCallback):
    """Keeps the gradient of each optimizer step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))


def away(folder, seed=0, scale=0.05):
    """The model in a folder, moved at random."""
    model, generator = load(folder), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def adapter(**options):
    """An adapter that changes the model from the first step on."""
    from peft import LoraConfig

    return LoraConfig(
        **{"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        | {"init_lora_weights": False} | options
    )  # fmt: skip
