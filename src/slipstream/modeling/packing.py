"""From rollouts to micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from slipstream.records import MicroBatch, Rollout, StepTotals

PER_TOKEN = ("sampler_logps", "old_logps", "ref_logps", "entropy_mask")


def loss_mask(rollout: Rollout) -> Tensor:
    """1.0 for each completion token that enters the loss, 0.0 for the others; on the CPU."""
    tokens = len(rollout.completion.ids)
    if not rollout.in_loss:
        return torch.zeros(tokens)
    own = rollout.extra.get("loss_mask")
    return torch.ones(tokens) if own is None else own.cpu()


class Packer:
    """Puts rows of similar length together and pads them to the longest.

    Rows are padded on the right: in a causal model no real token sees the padding, so no attention mask is needed and
    the fast attention kernels apply.

    Args:
        rows: Rows of a micro-batch, at most.
        pad_token_id: Any valid token id.
        device: Where the tensors go.
        pad_to_multiple_of: Pad rows further, to a multiple of this many tokens.
    """

    def __init__(
        self, rows: int, pad_token_id: int, device: torch.device, pad_to_multiple_of: int | None = None
    ) -> None:
        self.rows = rows
        self.pad_token_id = pad_token_id
        self.device = device
        self.multiple = pad_to_multiple_of or 1

    def pack(self, rollouts: Sequence[Rollout], totals: StepTotals) -> Iterator[MicroBatch]:
        """Split `rollouts` into micro-batches of at most `rows` rows; each rollout is in exactly one.

        Ranks with equally many rollouts make equally many micro-batches, so their collectives match.
        """
        by_length = sorted(rollouts, key=lambda r: len(r.prompt.ids) + len(r.completion.ids), reverse=True)
        for start in range(0, len(by_length), self.rows):
            yield self.micro_batch(by_length[start : start + self.rows], totals)

    def micro_batch(self, rollouts: list[Rollout], totals: StepTotals) -> MicroBatch:
        """The tensors of these rows."""
        lengths = [len(r.prompt.ids) + len(r.completion.ids) for r in rollouts]
        longest = -(-max(lengths) // self.multiple) * self.multiple
        input_ids = torch.full((len(rollouts), longest), self.pad_token_id, dtype=torch.long)
        positions, targets, rows, mask = [], [], [], []
        for i, rollout in enumerate(rollouts):
            prompt, completion = rollout.prompt.ids, rollout.completion.ids
            ids = torch.tensor([*prompt, *completion], dtype=torch.long)
            input_ids[i, : len(ids)] = ids
            # The token at position p is predicted from position p - 1.
            first = i * longest + len(prompt) - 1
            positions.append(torch.arange(first, first + len(completion)))
            targets.append(ids[len(prompt) :])
            rows.append(torch.full((len(completion),), i))
            mask.append(loss_mask(rollout))
        return MicroBatch(
            rollouts=rollouts,
            input_ids_BT=input_ids.to(self.device),
            attention_mask_BT=(torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)).long().to(self.device),
            positions_N=torch.cat(positions).to(self.device),
            targets_N=torch.cat(targets).to(self.device),
            rows_N=torch.cat(rows).to(self.device),
            mask_N=torch.cat(mask).to(self.device),
            advantages_B=torch.tensor([r.advantage for r in rollouts], dtype=torch.float32, device=self.device),
            totals=totals,
            per_token=self._per_token(rollouts),
        )

    def _per_token(self, rollouts: list[Rollout]) -> dict[str, Tensor]:
        values = {}
        for name in PER_TOKEN:
            if all(name in r.extra for r in rollouts):
                values[name] = torch.cat([r.extra[name] for r in rollouts]).to(self.device)
        return values
