"""Forward and backward passes of one optimizer step: padded, packed, and packed with shared prompts.

All ways learn from the same rollouts with the same random model, in one process, in turns, and their gradients are
compared. Each is measured with whole logits and a chunk at a time. Seconds (of processor time on a CPU) are the best of
the repeats, after one that does not count; the peak is that of tensors beyond the model and its gradients. Packed
micro-batches have as many tokens as the largest padded one. Writes JSON and prints a table; ratios are to rows that are
padded on the right to the longest of their micro-batch, with whole logits.

    python benchmarks/training_step.py                                         # small, on the CPU
    python benchmarks/training_step.py --shape qwen2-1.5b --prompt-tokens 1000 \
        --out benchmarks/results/training_step_h200_1000.json                  # on a GPU
    python benchmarks/training_step.py --shape qwen2-1.5b --prompts 16 --completion-tokens 200 --max-completion 512 \
        --sweep --out benchmarks/results/training_sweep_h200.json              # on a GPU, see training_sweep.py
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import flops
import torch
import training_sweep
import transformers
from shapes import SHAPES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM

from slipstream.modeling.attention import packed_attention
from slipstream.modeling.logprobs import score_tokens
from slipstream.modeling.packable import obstacle
from slipstream.modeling.packing import Packer
from slipstream.records import Completion, Prompt, Rollout, StepTotals

ROWS = {"padded": {}, "packed": {"packed": True}, "shared": {"packed": True, "share_prompts": True}}
WHOLE = 10**9


def make_rollouts(args: argparse.Namespace, vocabulary: int) -> list[Rollout]:
    """Prompts of about the same length; completions as long runs of sampling have them, many short and some long."""
    draw = random.Random(0)
    rollouts = []
    for index in range(args.prompts):
        ids = [draw.randrange(vocabulary) for _ in range(round(args.prompt_tokens * draw.uniform(0.8, 1.2)))]
        prompt = Prompt(ids, {}, index)
        for _ in range(args.group):
            length = min(args.max_completion, max(1, round(draw.lognormvariate(0, 0.6) * args.completion_tokens)))
            completion = Completion([draw.randrange(vocabulary) for _ in range(length)], None, 0, "stop")
            rollouts.append(Rollout(prompt, completion, "", False, advantage=draw.gauss(0, 1)))
    return rollouts


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations within it make, as long as they live: for a CPU, which keeps no count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tree_map_only(torch.Tensor, self._count, result)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def gone(_: weakref.ref) -> None:
            self.now -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def peak_memory(device: torch.device, step: Callable[[], object]) -> float:
    """The peak of memory while `step` runs, beyond what there was before, in MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with LiveBytes() as live:
        step()
    return live.peak / 2**20


def learn(model: torch.nn.Module, packer: Packer, rollouts: list[Rollout], chunk_rows: int | None, autocast) -> dict:
    """One optimizer step's forward and backward passes."""
    head = model.get_output_embeddings()
    totals = StepTotals(len(rollouts), sum(len(r.completion.ids) for r in rollouts), 1)
    tokens = micro_batches = 0
    with packed_attention(model) if packer.packed else nullcontext():
        for batch in packer.pack(rollouts, totals):
            with autocast():
                output = score_tokens(model, head, batch, temperature=1.0, entropies=True, chunk_rows=chunk_rows)
                loss = -(batch.advantages_B[batch.rows_N] * output.logps_N).sum() / totals.tokens
            loss.backward()
            tokens += batch.input_ids_BT.numel()
            micro_batches += 1
    return {"tokens": tokens, "micro_batches": micro_batches}


def clear(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        # Not None: the gradients' own memory is not what is compared.
        parameter.grad = torch.zeros_like(parameter)


def measure(args: argparse.Namespace, device: torch.device) -> dict:
    """Every way, and how they compare."""
    config = SHAPES[args.shape]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.weights)).to(device).train()
    if args.gradient_checkpointing == "on":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    why = obstacle(model, model.get_output_embeddings())
    if why is not None:
        raise SystemExit(f"packed rows do not work: {why}")
    rollouts = make_rollouts(args, config.vocab_size)
    half = device.type == "cuda" and args.weights == "float32"
    autocast = (lambda: torch.autocast("cuda", torch.bfloat16)) if half else nullcontext
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    # Others may work on the same processor.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    real = sum(len(r.prompt.ids) + len(r.completion.ids) for r in rollouts)
    steps = {
        f"{rows}, {logits}": partial(learn, model, Packer(args.rows, 0, device, **options), rollouts, chunk, autocast)
        for rows, options in ROWS.items()
        for logits, chunk in (("whole", WHOLE), ("chunked", args.chunk_rows))
    }
    ways: dict[str, dict] = {}
    reference = None
    for name, step in steps.items():
        clear(model)
        try:
            ways[name] = {"peak_mib": peak_memory(device, step)}
        except torch.OutOfMemoryError:
            ways[name] = {"error": "out of memory"}
            torch.cuda.empty_cache()
            continue
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        reference = gradient if reference is None else reference
        ways[name]["gradient_difference"] = ((gradient - reference).norm() / reference.norm()).item()
        del gradient
    working = [name for name, way in ways.items() if "error" not in way]
    seconds: dict[str, list[float]] = {name: [] for name in working}
    for _ in range(args.repeats):
        for name in working:
            clear(model)
            synchronize()
            start = clock()
            ways[name] |= steps[name]()
            synchronize()
            seconds[name].append(clock() - start)
            ways[name]["seconds"] = min(seconds[name])
    base = ways["padded, whole"]
    for way in ways.values():
        if "seconds" in way and "seconds" in base:
            way["speedup"] = base["seconds"] / way["seconds"]
            way["memory_ratio"] = way["peak_mib"] / base["peak_mib"]
    parameters = sum(p.numel() for p in model.parameters())
    result = {"rollout_tokens": real, "parameters": parameters, "ways": ways}
    if device.type == "cuda":
        rate = flops.matrix_rate(device)
        operations = [flops.needed(config, parameters, rollouts, prompts_once=once) for once in (False, True)]
        result["matrix_flops_per_second"] = rate
        for name, way in ways.items():
            if "seconds" in way:
                way["utilization"] = operations[name.startswith("shared")] / way["seconds"] / rate
                way["utilization_of_all"] = operations[0] / way["seconds"] / rate
    return result


def sweep(args: argparse.Namespace) -> dict:
    """Settings one after the other; what a setting leaves out is as the other options say."""
    defaults = {name: getattr(args, name) for name in ("weights", "optimizer", "compile", "liger")}
    defaults |= {"gradient_checkpointing": args.gradient_checkpointing, "way": "packed", "entropies": "on"}
    rollouts = make_rollouts(args, SHAPES[args.shape].vocab_size)
    return training_sweep.sweep(args, rollouts, defaults | {"tokens": 16384})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="random weights of this shape")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--weights", choices=("float32", "bfloat16"), default="float32", help="float32 computes in bfloat16 on a GPU"
    )
    parser.add_argument(
        "--sweep",
        nargs="*",
        default=None,
        metavar="SETTING",
        help="settings such as way=packed,tokens=16384,compile=parts one after the other, instead of the comparison; "
        "none: the usual ones",
    )
    parser.add_argument("--optimizer", choices=("off", "adamw"), default="off", help="in a sweep; fused on a GPU")
    parser.add_argument("--compile", choices=("off", "parts", "layers"), default="off", help="in a sweep")
    parser.add_argument("--liger", choices=("off", "on"), default="off", help="in a sweep")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8, help="completions a prompt")
    parser.add_argument("--rows", type=int, default=4, help="rows of a padded micro-batch")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--completion-tokens", type=int, default=64, help="their median")
    parser.add_argument("--max-completion", type=int, default=256)
    parser.add_argument(
        "--chunk-rows", type=int, default=None, help="rows of logits; by default 128, and many on a GPU"
    )
    parser.add_argument(
        "--gradient-checkpointing",
        choices=("on", "off"),
        nargs="?",
        const="on",
        default="off",
        help="on if given alone",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.chunk_rows is None and device.type == "cpu":
        args.chunk_rows = 128
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    )
    result = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"},
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    } | (measure(args, device) if args.sweep is None else sweep(args))  # fmt: skip
    kind = "step" if args.sweep is None else "sweep"
    out = args.out or Path(__file__).parent / "results" / f"training_{kind}_{device.type}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    if args.sweep is not None:
        print(f"matrix rate {result['matrix_flops_per_second'] / 1e12:.0f} TFLOP/s; seconds, use, of all, peak")
        for text, row in result["sweep"].items():
            print(training_sweep.line(text, row))
        return
    print(f"{'':18}{'seconds':>9}{'speedup':>9}{'peak MiB':>10}{'memory':>8}{'tokens':>9}{'gradient':>10}")
    for way, values in result["ways"].items():
        if "error" in values:
            print(f"{way:18}{values['error']}")
            continue
        print(
            f"{way:18}{values['seconds']:9.3f}{values['speedup']:8.2f}x{values['peak_mib']:10.0f}"
            f"{values['memory_ratio']:8.2f}{values['tokens']:9}{values['gradient_difference']:10.1e}"
        )


if __name__ == "__main__":
    main()
