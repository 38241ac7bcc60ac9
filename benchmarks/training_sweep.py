"""Settings of the training part one after the other in one process: seconds, memory, and use of the device's rate.

Utilization is of the measured rate of a large bfloat16 product, and counts what the rollouts' own tokens need: no
padding, nothing that gradient checkpointing computes again, the head at completion tokens alone, a shared prompt once.
`of all` counts a prompt with each of its completions, whether they share it or not.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import flops
import torch
from shapes import SHAPES
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from slipstream.modeling.attention import packed_attention
from slipstream.modeling.logprobs import score_tokens
from slipstream.modeling.packing import Packer
from slipstream.records import Rollout, StepTotals

ALLOWED: dict[str, tuple[str, ...]] = {
    "way": ("padded", "packed", "shared"),
    "weights": ("float32", "bfloat16"),
    "optimizer": ("off", "adamw"),
    "compile": ("off", "parts", "layers"),
    "liger": ("off", "on"),
    "gradient_checkpointing": ("on", "off"),
    "entropies": ("on", "off"),
}
NUMBERS = ("tokens",)
# Each changes one thing of those before it, so that a table shows what is gained by what.
USUAL = (
    "way=packed,tokens=4096,gradient_checkpointing=on",
    "way=packed,tokens=16384,gradient_checkpointing=on",
    "way=packed,tokens=16384,gradient_checkpointing=off",
    "way=packed,tokens=16384,gradient_checkpointing=off,weights=bfloat16",
    "way=packed,tokens=16384,gradient_checkpointing=off,weights=bfloat16,compile=parts",
    "way=packed,tokens=16384,gradient_checkpointing=off,weights=bfloat16,compile=layers",
    "way=packed,tokens=16384,gradient_checkpointing=on,weights=bfloat16,compile=parts",
    "way=shared,tokens=16384,gradient_checkpointing=on,weights=bfloat16",
    "way=shared,tokens=16384,gradient_checkpointing=off,weights=bfloat16,compile=parts",
    "way=packed,tokens=16384,gradient_checkpointing=off,weights=float32,compile=parts,optimizer=adamw",
    "way=packed,tokens=16384,gradient_checkpointing=off,weights=bfloat16,liger=on",
)


def parsed(text: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """A setting such as `way=packed,tokens=16384`, and the defaults for what it leaves out."""
    setting = dict(defaults)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name in NUMBERS and value.isdecimal() and int(value) > 0:
            setting[name] = int(value)
        elif value in ALLOWED.get(name, ()):
            setting[name] = value
        else:
            allowed = "; ".join(f"{n}={'|'.join(v)}" for n, v in ALLOWED.items())
            raise SystemExit(f"--sweep: {part!r} is not one of {allowed}; tokens=N.")
    return setting


@contextmanager
def module_kept(shape: str) -> Iterator[None]:
    """What Liger puts into the module of transformers is looked up in every pass, and by the models after: undo it."""
    module = vars(sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(SHAPES[shape])].__module__])
    before = dict(module)
    try:
        yield
    finally:
        module.update(before)


def make_model(shape: str, setting: dict[str, Any], device: torch.device) -> nn.Module:
    """A random model of this shape, as the setting has it. It is made on the device, which is quicker."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=getattr(torch, setting["weights"])).train()
    if setting["gradient_checkpointing"] == "on":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if setting["liger"] == "on":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=False)
    for layer in model.model.layers if setting["compile"] != "off" else ():
        parts = [layer] if setting["compile"] == "layers" else [layer.mlp, layer.input_layernorm]
        for part in parts if setting["compile"] == "layers" else [*parts, layer.post_attention_layernorm]:
            part.compile(dynamic=True)
    return model


class Step:
    """One optimizer step of a setting."""

    def __init__(self, args: argparse.Namespace, setting: dict[str, Any], rollouts: list[Rollout]) -> None:
        self.device, self.rollouts = torch.device(args.device), rollouts
        self.model = make_model(args.shape, setting, self.device)
        packed = setting["way"] != "padded"
        self.packer = Packer(
            args.rows, 0, self.device, packed=packed, share_prompts=setting["way"] == "shared",
            max_tokens=setting["tokens"],
        )  # fmt: skip
        half = self.device.type == "cuda" and setting["weights"] == "float32"
        self.autocast = torch.autocast("cuda", torch.bfloat16) if half else nullcontext()
        self.entropies, self.chunk_rows = setting["entropies"] == "on", args.chunk_rows
        self.optimizer = None
        if setting["optimizer"] == "adamw":
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=1e-6, fused=self.device.type == "cuda" or None
            )

    def __call__(self) -> dict[str, int]:
        """Forward and backward passes of all micro-batches, and the optimizer's step; gradients are made anew."""
        totals = StepTotals(len(self.rollouts), sum(len(r.completion.ids) for r in self.rollouts), 1)
        head = self.model.get_output_embeddings()
        tokens = count = 0
        with packed_attention(self.model) if self.packer.packed else nullcontext():
            for batch in self.packer.pack(self.rollouts, totals):
                tokens, count = tokens + batch.input_ids_BT.numel(), count + 1
                with self.autocast:
                    output = score_tokens(
                        self.model, head, batch, temperature=1.0, entropies=self.entropies, chunk_rows=self.chunk_rows
                    )
                    loss = -(batch.advantages_B[batch.rows_N] * output.logps_N).sum() / totals.tokens
                loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return {"tokens_computed": tokens, "micro_batches": count}


def measure(args: argparse.Namespace, setting: dict[str, Any], rollouts: list[Rollout], rate: float) -> dict[str, Any]:
    """A setting's measurements, or what it failed with."""
    cuda = torch.device(args.device).type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    clock = time.perf_counter if cuda else time.process_time
    try:
        step = Step(args, setting, rollouts)
        # Kernels are compiled and chosen, for sizes that change too.
        for _ in range(2):
            counts = step()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(args.repeats):
            synchronize()
            start = clock()
            step()
            synchronize()
            seconds.append(clock() - start)
    except (torch.OutOfMemoryError, ImportError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    parameters = sum(p.numel() for p in step.model.parameters())
    operations = {once: flops.needed(SHAPES[args.shape], parameters, rollouts, prompts_once=once) for once in (0, 1)}
    best = min(seconds)
    measured = {
        "seconds": best, "each": seconds, "parameters": parameters, **counts,
        "utilization": operations[setting["way"] == "shared"] / best / rate,
        "utilization_of_all": operations[0] / best / rate,
    }  # fmt: skip
    return measured | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if cuda else {})


def sweep(args: argparse.Namespace, rollouts: list[Rollout], defaults: dict[str, Any]) -> dict[str, Any]:
    """All settings, each with a model of its own."""
    device = torch.device(args.device)
    settings = {text: parsed(text, defaults) for text in args.sweep or USUAL}
    rate = flops.matrix_rate(device)
    rows = {}
    for text, setting in settings.items():
        with module_kept(args.shape):
            rows[text] = {"setting": setting} | measure(args, setting, rollouts, rate)
        print(line(text, rows[text]), flush=True)
        # What compiled code keeps belongs to the model that is gone.
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    real = sum(len(r.prompt.ids) + len(r.completion.ids) for r in rollouts)
    return {"rollout_tokens": real, "matrix_flops_per_second": rate, "sweep": rows}


def line(text: str, row: dict[str, Any]) -> str:
    """A setting's line of the table."""
    if "error" in row:
        return f"{row['error']}  {text}"
    return (
        f"{row['seconds']:8.3f} s{row['utilization']:7.1%}{row['utilization_of_all']:8.1%}"
        f"{row.get('peak_gib', float('nan')):7.1f} GiB{row['micro_batches']:4} x"
        f"{row['tokens_computed'] // row['micro_batches']:6}  {text}"
    )
