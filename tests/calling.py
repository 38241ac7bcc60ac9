"""A tiny chat model that calls tools: its tokenizer's chat template shows them, and it knows a few conversations by
heart. What it writes is determined by the prompt: "none" is answered at once, "one" calls `add` once, "two" twice, and
"any" calls it or does not, as chance has it."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch

CHAT_TEMPLATE = (
    "{% if tools %}{{ '<system>' }}{% for t in tools %}{{ t['function']['name'] + ';' }}{% endfor %}{{ '<end>\n' }}"
    "{% endif %}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<assistant>' + m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}"
    "{{ '<tool_call>{\"name\": \"' + c['function']['name'] + '\", \"arguments\": ' }}"
    "{{ c['function']['arguments'] | tojson }}{{ '}</tool_call>' }}"
    "{% endfor %}{{ '<end>\n' }}"
    "{% else %}{{ '<' + m['role'] + '>' + m['content'] + '<end>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
ADD = {"name": "add", "arguments": {"a": 1, "b": 2}}
RESULT = "3"


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def call(name="add", **arguments):
    """A call in the form of messages."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def conversation(word, calls, answer="ok"):
    """What follows a prompt of that word."""
    turn = {"role": "assistant", "content": "", "tool_calls": [call(a=1, b=2)]}
    told = {"role": "tool", "name": "add", "content": RESULT}
    return [{"role": "user", "content": word}], [turn, told] * calls + [{"role": "assistant", "content": answer}]


CONVERSATIONS = {word: conversation(word, calls) for calls, word in enumerate(("none", "one", "two"))}
EITHER = [conversation("any", calls) for calls in (0, 1)]
ROWS = [{"prompt": prompt, "calls": len(answers) // 2} for prompt, answers in CONVERSATIONS.values()]


def tokenizer():
    """`tiny.tokenizer`, with the markers of calls as tokens."""
    made = tiny.tokenizer()
    made.add_special_tokens({"extra_special_tokens": ["<user>", "<assistant>", "<system>", "<tool>"]})
    made.add_tokens(["<tool_call>", "</tool_call>"], special_tokens=False)
    made.chat_template = CHAT_TEMPLATE
    return made


def schemas():
    """Of `add`."""
    from transformers.utils import get_json_schema

    return [get_json_schema(add)]


def build(path: str | Path, *, steps: int = 300, seed: int = 0, **shape) -> Path:
    """Save the model, trained until it knows the conversations, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    tiny.build(path, seed=seed, **shape)
    words = tokenizer()
    model = AutoModelForCausalLM.from_pretrained(path)
    rows = []
    for prompt, answers in [*CONVERSATIONS.values(), *EITHER]:
        options = {"tools": schemas(), "return_dict": False}
        ids = words.apply_chat_template([*prompt, *answers], **options)
        first = len(words.apply_chat_template(prompt, add_generation_prompt=True, **options))
        rows.append((ids, first))
    width = max(len(ids) for ids, _ in rows)
    inputs = torch.tensor([ids + [words.pad_token_id] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([[-100] * first + ids[first:] + [-100] * (width - len(ids)) for ids, first in rows])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(steps):
            loss = model(input_ids=inputs, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert loss.item() < 0.03, loss
    model.save_pretrained(path)
    words.save_pretrained(path)
    return Path(path)


def trainer(model, folder, reward=None, tools=(add,), rows=ROWS, environment_factory=None, **values):
    """A GRPO trainer of the model."""
    from datasets import Dataset

    from slipstream import GRPOConfig, GRPOTrainer

    settings = {
        "max_completion_length": 120, "per_device_train_batch_size": 6, "num_generations": 2, "max_steps": 1,
        "logging_steps": 1, "learning_rate": 1e-3, "report_to": [], "gradient_checkpointing": False,
        "save_strategy": "no", "disable_tqdm": True, "html_report": False, "temperature": 0.2,
    } | values  # fmt: skip
    args = GRPOConfig(output_dir=str(folder), **settings)
    rows = Dataset.from_list(rows)
    return GRPOTrainer(
        model, reward or (lambda completions, **_: [float(len(c)) for c in completions]), args, rows, rows,
        processing_class=tokenizer(), tools=tools and list(tools), environment_factory=environment_factory,
    )  # fmt: skip


def sampled(trainer, rows=(0, 1, 2), evaluation=True, count=1):
    """Rollouts of these rows of the dataset, `count` of each."""
    wanted = [(row, 0, count) for row in rows]
    return trainer._generate(trainer.train_dataset, wanted, (0, "test"), evaluation=evaluation)
