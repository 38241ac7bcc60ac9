"""Make the quickstart's data and model: a small chat model that learnt two-digit addition from a careless pupil.

    python examples/quickstart/pretrain.py   # some minutes on two cores; writes data/ and model/ beside this file

The model is trained by supervised learning on the pupil's answers, and stopped before it imitates them perfectly. The
pupil can add, but carries by feel: where the ones add up to six or more, three answers of five are off by ten.
Imitation learns the mistakes with the rest; which answers are right, reinforcement learning finds out from the reward.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["<pad>", "<end>", "<user>", "<assistant>", "What", "is", "?", "+", *"0123456789"]
HELD_OUT = 400
WRONG = 0.6

Problem = tuple[int, int]


def question(problem: Problem) -> list[dict[str, str]]:
    """The problem as a conversation."""
    return [{"role": "user", "content": f"What is {problem[0]} + {problem[1]}?"}]


def pupil(problem: Problem, rng: random.Random) -> int:
    """The careless pupil's answer."""
    ones, right = problem[0] % 10 + problem[1] % 10, sum(problem)
    if ones < 6 or rng.random() >= WRONG:
        return right
    # Forgets to carry, or carries where there is nothing to carry.
    return right - 10 if ones >= 10 else right + 10


def split(seed: int) -> tuple[list[Problem], list[Problem]]:
    """Training problems and held-out ones; a held-out sum does not occur in training in the other order either."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng.shuffle(pairs)
    test = [rng.choice([(a, b), (b, a)]) for a, b in pairs[:HELD_OUT]]
    train = sorted({p for a, b in pairs[HELD_OUT:] for p in ((a, b), (b, a))})
    rng.shuffle(train)
    return train, test


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word, sign and digit."""
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Digits(True)]
    )
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Two layers, six heads of 32 (the smallest that vLLM's CPU attention takes), 0.9 million parameters."""
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


class Encoder:
    """Turns problems and answers into padded token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> None:
        rendered = [
            tokenizer.apply_chat_template(question(p), add_generation_prompt=True, tokenize=False) for p in problems
        ]
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        self.prompts = dict(zip(problems, ids, strict=True))
        self.digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
        self.end, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.prompt_length = len(ids[0])  # the same for all: two digits each

    def batch(self, problems: list[Problem], answers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Input ids, and the targets of the answers' tokens (-100 elsewhere)."""
        ids = torch.full((len(problems), self.prompt_length + 4), self.pad)
        targets = torch.full((len(problems), 4), -100)
        for i, (problem, answer) in enumerate(zip(problems, answers, strict=True)):
            tail = torch.tensor([self.digits[int(d)] for d in str(answer)] + [self.end])
            ids[i, : self.prompt_length] = torch.tensor(self.prompts[problem])
            ids[i, self.prompt_length : self.prompt_length + len(tail)] = tail
            targets[i, : len(tail)] = tail
        return ids, targets


def accuracy(model: LlamaForCausalLM, encoder: Encoder, problems: list[Problem]) -> tuple[float, float]:
    """Shares of problems whose most likely answer is right, and the mean probability of the right answer."""
    ids, targets = encoder.batch(problems, [sum(p) for p in problems])
    with torch.no_grad():
        logps = model(ids).logits[:, encoder.prompt_length - 1 : -1].log_softmax(-1)
    counts = targets != -100
    right = ((logps.argmax(-1) == targets) | ~counts).all(1).float().mean().item()
    picked = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return right, (picked * counts).sum(1).exp().mean().item()


def train(model: LlamaForCausalLM, encoder: Encoder, problems: list[Problem], test: list[Problem], steps: int,
          seed: int) -> None:  # fmt: skip
    """Supervised learning on the pupil's answers."""
    rng, start = random.Random(seed), time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.99))
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, step / 50) * (1 - (step - 1) / steps)
        batch = rng.choices(problems, k=256)
        ids, targets = encoder.batch(batch, [pupil(p, rng) for p in batch])
        logits = model(ids).logits[:, encoder.prompt_length - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps:
            right, probability = accuracy(model, encoder, test)
            print(
                f"step {step}  loss {loss.item():.3f}  held-out accuracy {right:.3f}  "
                f"probability of the right answer {probability:.3f}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for data/ and model/")
    parser.add_argument("--steps", type=int, default=700, help="where supervised learning stops")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    problems, test = split(args.seed)
    (args.out / "data").mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", problems), ("test", test)):
        lines = [json.dumps({"prompt": question(p), "solution": str(sum(p))}) for p in rows]
        (args.out / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    if not args.steps:
        return
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(problems)} problems, {len(test)} held out")
    train(model, Encoder(tokenizer, problems + test), problems, test, args.steps, args.seed)
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    # What others will load must be what was trained, its tokenizer included.
    saved = AutoModelForCausalLM.from_pretrained(args.out / "model")
    encoder = Encoder(AutoTokenizer.from_pretrained(args.out / "model"), test)
    right, probability = accuracy(saved, encoder, test)
    print(f"saved model: held-out accuracy {right:.3f}, probability of the right answer {probability:.3f}")
    if not 0.2 <= right <= 0.4:
        sys.exit(
            f"held-out accuracy {right:.3f} is not within 0.2 and 0.4: where right and wrong answers are nearly as "
            "likely, rounding decides, and another machine may stop elsewhere. Try other --steps."
        )


if __name__ == "__main__":
    main()
