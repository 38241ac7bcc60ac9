"""One of two ranks that share one copy of the weights in their engines: samples, and compares with transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from slipstream.lifetime import leave_process_group

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "integration")]


def main() -> None:
    import engines
    import torch
    import torch.distributed as dist

    from slipstream.generation.colocate import ColocateEngine
    from slipstream.generation.engine import Request, Sampling
    from slipstream.weights.export import named_tensors
    from slipstream.weights.plan import WeightUpdateError

    path, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    engine = ColocateEngine(
        model=path, dtype="float32", max_model_len=128, max_num_seqs=16, tensor_parallel_size=2, reference=True
    )
    found: dict = {"errors": [], "greedy": [], "told": [], "refused": []}
    prompts = engines.prompts(3, 20)
    for version in (1, 2):
        models = [engines.step(engines.policy(path), 10 * version + i, scale=0.1) for i in range(2)]
        engine.update_weights(version, named_tensors(models[0]))
        engine.update_reference(named_tensors(models[1]))
        for share in (0.0, 0.5):
            # Rank 1 has one prompt, another one; then none.
            own = (prompts[:2], prompts[2:])[rank]
            requests = [Request(prompt, n=2, seed=None if share else 7 + rank, mixture=share) for prompt in own]
            told: list = []
            answers = engine.generate(requests, Sampling(12), lambda i, ids, told=told: told.append((i, ids)))
            assert sorted(told) == [(i, [c.ids for c in group]) for i, group in enumerate(answers)]
            assert [len(group) for group in answers] == [2] * len(own)
            found["errors"] += [
                engines.mixture_errors(models, prompt, completion, share).max().item()
                for prompt, group in zip(own, answers, strict=True)
                for completion in group
            ]
        asked = [Request(prompts[0])] if rank == 0 else []
        for group in engine.generate(asked, Sampling(12, temperature=0.0)):
            expected = engines.greedy(models[0], prompts[0], 12, stop=[1])
            found["greedy"].append(group[0].ids == expected)
    for requests, sampling in (
        ([Request(prompts[0])], Sampling(12 + rank)),
        ([Request(prompts[0] * (1 if rank else 20))], Sampling(12)),
        ([Request(prompts[0], mixture=0.5 * rank)], Sampling(12)),
    ):
        try:
            engine.generate(requests, sampling)
        except ValueError as error:
            found["refused"].append(str(error))
    broken = [
        (name, tensor * float("nan") if "up_proj" in name else tensor) for name, tensor in named_tensors(models[0])
    ]
    try:
        engine.update_weights(3, broken)
    except WeightUpdateError as error:
        found["refused"].append(str(error))
    assert torch.isfinite(torch.tensor(engine.generate([Request(prompts[0])], Sampling(4))[0][0].logprobs)).all()
    engine.close()
    assert dist.is_initialized()
    dist.barrier()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    leave_process_group()
