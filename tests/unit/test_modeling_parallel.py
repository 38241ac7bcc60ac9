"""Scores and gradients under DDP and FSDP2 on two ranks, packed, with shared prompts and gradient checkpointing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def wrap(model, kind):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    precision = {
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16)
    } if kind == "fsdp, bfloat16" else {}  # fmt: skip
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **precision)
    if not model.config.tie_word_embeddings:
        fully_shard(model.lm_head, mesh=mesh, **precision)
    # Also the outermost weights are gone when its forward pass is over.
    return fully_shard(model, mesh=mesh, reshard_after_forward=True, **precision)


def full_gradients(model):
    parts = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return torch.cat([p.flatten().double() for p in parts])


def run(kind, tied):
    """One of two ranks: each takes half of the rollouts, and averaged gradients must be half of all rows' sum."""
    import test_modeling_packed as single

    from slipstream.modeling.attention import packed_attention
    from slipstream.modeling.logprobs import score_tokens
    from slipstream.modeling.packable import obstacle

    rank = torch.distributed.get_rank()
    model = single.build("Llama", single.SHAPE | {"tie_word_embeddings": tied})
    model.lm_head.requires_grad_(True)
    rollouts = single.make_rollouts()
    logps, _, gradient = single.alone(model, rollouts)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = wrap(model.train(), kind)
    head = model.get_output_embeddings()
    assert obstacle(wrapped, head) is None
    mine = rollouts[:4] if rank == 0 else rollouts[3:]

    def largest(count):
        every = torch.tensor(count)
        torch.distributed.all_reduce(every, torch.distributed.ReduceOp.MAX)
        return int(every)

    packer = single.packer(share_prompts=True, max_tokens=24, agree=largest)
    error = 0.0
    for _ in range(2):  # a second time, since wrappers keep state
        model.zero_grad()
        with packed_attention(wrapped):
            batches = list(packer.pack(mine, single.TOTALS))
            for i, batch in enumerate(batches):
                if kind == "ddp":
                    wrapped.require_backward_grad_sync = i == len(batches) - 1
                output = score_tokens(
                    wrapped, head, batch, temperature=1.0, entropies=True, entropy_gradient=True, chunk_rows=3
                )
                # The fourth rollout is on both ranks: half of it on each.
                weight_B = torch.tensor([0.5 if r is rollouts[3] else 1.0 for r in batch.rollouts])
                advantages = batch.advantages_B[batch.rows_N]
                parts = zip(
                    *(x.split([len(r.completion.ids) for r in batch.rollouts]) for x in
                      (output.logps_N, output.entropies_N, advantages)),
                    weight_B, strict=True,
                )  # fmt: skip
                sum(w * single.loss_of(a, b, c) for a, b, c, w in parts).backward()
                for rollout, values in zip(batch.rollouts, batch.split_rows(output.logps_N.detach()), strict=True):
                    right = logps[next(j for j, r in enumerate(rollouts) if r is rollout)]
                    error = max(error, (values - right).abs().max().item())
        found = 2 * full_gradients(model)
        distance = ((found - gradient).norm() / gradient.norm()).item()
    return {"logps": error, "gradient": distance, "micro-batches": len(batches)}


KINDS = [("ddp", True), ("fsdp", True), ("fsdp", False), ("fsdp, bfloat16", True)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("number", range(len(KINDS)), ids=[f"{k}, {'tied' if t else 'untied'}" for k, t in KINDS])
def test_two_ranks_learn_what_one_learns(results, number):
    rough = "bfloat16" in KINDS[number][0]
    for rank in results:
        assert rank[number]["logps"] < (0.1 if rough else 1e-5)
        assert rank[number]["gradient"] < (0.05 if rough else 1e-5)
        assert rank[number]["micro-batches"] == results[0][number]["micro-batches"] > 1


if __name__ == "__main__":
    from slipstream.lifetime import leave_process_group

    torch.distributed.init_process_group("gloo")
    answers = [run(*kind) for kind in KINDS]
    Path(sys.argv[1], f"{torch.distributed.get_rank()}.json").write_text(json.dumps(answers))
    leave_process_group()
