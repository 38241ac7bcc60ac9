"""Log-probabilities of sampled tokens, by Triton's interpreter, against float64."""

from __future__ import annotations

from interpreted import check, needs_triton

KERNEL = """
import torch
from slipstream.vllm_compat import token_logps

token_logps._PART = 16
generator = torch.Generator().manual_seed(0)
float32, float16, bfloat16 = torch.float32, torch.float16, torch.bfloat16
for rows, size, dtype in ((1, 5, float32), (3, 16, float32), (4, 50, bfloat16), (2, 161, float16)):
    # A row of a larger tensor, as vLLM's padded vocabularies have it.
    whole = (torch.randn(rows, size + 7, generator=generator) * 8).to(dtype)
    whole[:, size:] = 1e4
    logits = whole[:, :size]
    tokens = torch.randint(size, (rows, 1), generator=generator)
    logits[-1, : max(1, size - 20)] = float("-inf")  # whole parts of a row that cannot be sampled
    tokens[-1] = size - 1
    for ids in (tokens, tokens.int()):
        found = token_logps.token_logps(logits, ids)
        expected = logits.double().log_softmax(-1).gather(-1, tokens)[:, 0]
        assert found.shape == (rows,) and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-6)
print("all equal")
"""


@needs_triton
def test_as_of_a_softmax_in_float64():
    check(KERNEL)
