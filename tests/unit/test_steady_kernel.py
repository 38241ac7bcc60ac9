"""The inputs of decode steps, by Triton's interpreter, against a plain loop."""

from __future__ import annotations

from interpreted import check, needs_triton

KERNEL = """
import torch
from slipstream.vllm_compat import steady_kernel

steady_kernel._WIDTH = 4
most, blocks, size = 7, 11, 16
generator = torch.Generator().manual_seed(0)
for count, padded in ((1, 1), (1, 2), (3, 4), (4, 4), (5, 7)):
    order = torch.randperm(most, generator=generator)[:count].int()
    computed = torch.randint(0, blocks * size, (most,), generator=generator).int()
    computed[order[0]] = 15  # the last place of a block
    last = torch.randint(0, 1000, (most, 1), generator=generator)
    table = torch.randint(1, 500, (most, blocks), generator=generator).int()
    int32 = lambda *shape: torch.full(shape, 77, dtype=torch.int32)
    out = dict(
        ids=int32(most), positions=int32(most).long(), seq_lens=int32(most), slots=int32(most).long(),
        starts=int32(most + 1), blocks=int32(most, blocks), sampled=int32(most), updated=int32(most))
    rows = torch.cat([torch.tensor([count], dtype=torch.int32), order])
    steady_kernel.inputs(rows, computed, last, table, size, padded, **out)
    for place in range(padded):
        if place < count:
            row, done = int(order[place]), int(computed[order[place]])
            have = done // size + 1
            wanted = dict(
                ids=int(last[row]), positions=done, seq_lens=done + 1,
                slots=int(table[row, done // size]) * size + done % size, sampled=row, updated=row)
            assert out["blocks"][place, :have].tolist() == table[row, :have].tolist()
        else:
            wanted = dict(ids=0, positions=0, seq_lens=0, slots=-1, sampled=int(order[0]), updated=-1)
            assert not out["blocks"][place].any()
        found = {name: int(out[name][place]) for name in wanted}
        assert found == wanted, (count, padded, place, found, wanted)
    assert out["starts"][: padded + 1].tolist() == [min(i, count) for i in range(padded + 1)]
    assert all((out[name][padded:] == 77).all() for name in ("ids", "slots", "blocks", "updated"))
print("all equal")
"""


@needs_triton
def test_a_step_has_the_inputs_of_a_plain_loop():
    check(KERNEL)
