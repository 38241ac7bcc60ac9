"""From rollouts to micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence

import torch
from torch import Tensor

from slipstream.modeling import features
from slipstream.modeling.attention import Layout
from slipstream.modeling.partition import at_least, balanced_pieces, pieces_within
from slipstream.modeling.sending import sent
from slipstream.modeling.sharing import costs, saving, shared_with_previous, tokens_of
from slipstream.records import MicroBatch, Rollout, Segment, StepTotals

PER_TOKEN = ("sampler_logps", "old_logps", "ref_logps", "entropy_mask")
# Prompts are shared when that saves more than this part of all tokens: below, the keys and values that are gathered
# for it cost as much as it saves.
LEAST_SAVING = 0.1


def loss_mask(rollout: Rollout) -> Tensor:
    """1.0 for each completion token that enters the loss, 0.0 for the others; on the CPU."""
    tokens = len(rollout.completion.ids)
    if not rollout.in_loss:
        return torch.zeros(tokens)
    own = rollout.extra.get("loss_mask")
    return torch.ones(tokens) if own is None else own.cpu()


class Packer:
    """Makes micro-batches of rollouts, padded or packed.

    Padded, rows of similar length stand together and are padded to the longest. They are padded on the right: in a
    causal model no real token sees the padding, so no attention mask is needed and the fast attention kernels apply.

    Packed, all rollouts of a micro-batch stand one after the other in one row without padding, as many as fit into a
    budget of tokens. Completions of one prompt can share it: it stands there once, and each of them continues it.

    Args:
        rows: Rows of a padded micro-batch, at most.
        pad_token_id: Any valid token id.
        device: Where the tensors go.
        pad_to_multiple_of: Pad rows further, to a multiple of this many tokens.
        packed: Pack rows. The model must have passed `packable.obstacle`.
        share_prompts: Let completions of one prompt share it where that saves more than a tenth of the tokens.
        max_tokens: Tokens of a packed micro-batch, at most; a rollout that is longer has one of its own. None: as many
            as `rows` rows would have if all were as long as the longest. See `budget.measured_budget`.
        agree: Given the number of micro-batches that this rank needs, returns the largest of all ranks: each makes
            that many, so that their collectives match. The default is for a single rank. It is asked where rows are
            packed, or have images.
        placeholders: Token ids in whose places a model puts images. One that ends a completion is none of a prompt's,
            and nothing is predicted from it: padding stands there.
    """

    def __init__(
        self,
        rows: int,
        pad_token_id: int,
        device: torch.device,
        pad_to_multiple_of: int | None = None,
        *,
        packed: bool = False,
        share_prompts: bool = False,
        max_tokens: int | None = None,
        agree: Callable[[int], int] = int,
        placeholders: Collection[int] = (),
    ) -> None:
        self.rows = rows
        self.pad_token_id = pad_token_id
        self.device = device
        self.multiple = pad_to_multiple_of or 1
        self.packed = packed
        self.share_prompts = share_prompts
        self.max_tokens = max_tokens
        self.agree = agree
        self.placeholders = frozenset(placeholders)
        self.images = False

    def expect_images(self) -> None:
        """From now on rows may have images: they are padded, and together only where their features can be joined.

        All ranks must say so together.
        """
        self.packed, self.images = False, True

    def pack(self, rollouts: Sequence[Rollout], totals: StepTotals, group_size: int = 1) -> Iterator[MicroBatch]:
        """Split `rollouts` into micro-batches; each rollout is in exactly one, and none is empty.

        Every `group_size` of them stay together, in their order. Ranks with equally many rollouts make equally many
        micro-batches, so their collectives match. They are made one by one, each while the device still computes the
        one before it.
        """
        if not self.images and any(r.prompt.images is not None for r in rollouts):
            raise RuntimeError("a rollout has images, which `Packer.expect_images` did not announce on all ranks")
        groups = [list(rollouts[i : i + group_size]) for i in range(0, len(rollouts), group_size)]
        if self.packed:
            yield from self._pack_rows(groups, totals, group_size)
            return
        groups.sort(key=lambda g: max(tokens_of(r) for r in g), reverse=True)
        count = max(1, self.rows // group_size)
        pieces = self._pieces_of_a_form(groups, count) if self.images else _cut(groups, count)
        for piece in pieces:
            yield self.micro_batch([r for g in piece for r in g], totals, group_size)

    def _pieces_of_a_form(self, groups: list[list[Rollout]], count: int) -> list[list[list[Rollout]]]:
        """At most `count` groups a piece, all of whose features can be joined; as many pieces on every rank."""
        of_form: dict[Hashable, list[list[Rollout]]] = {}
        for group in groups:
            forms = {features.form(r.prompt.images) for r in group}
            if len(forms) > 1:
                raise ValueError(
                    "rows that have to be computed together have images of different forms: give the completions of a "
                    "group the same prompt."
                )
            of_form.setdefault(forms.pop(), []).append(group)
        pieces = [piece for alike in of_form.values() for piece in _cut(alike, count)]
        return at_least(pieces, self.agree(len(pieces)))

    def micro_batch(self, rollouts: list[Rollout], totals: StepTotals, group_size: int = 1) -> MicroBatch:
        """The tensors of these rows, padded."""
        lengths = [tokens_of(r) for r in rollouts]
        longest = self._rounded(max(lengths))
        input_ids = torch.full((len(rollouts), longest), self.pad_token_id, dtype=torch.long)
        positions, targets = [], []
        for i, rollout in enumerate(rollouts):
            prompt, completion = rollout.prompt.ids, rollout.completion.ids
            input_ids[i, : lengths[i]] = torch.tensor([*prompt, *self._seen(completion)])
            targets.append(torch.tensor(completion, dtype=torch.long))
            # The token at position p is predicted from position p - 1.
            first = i * longest + len(prompt) - 1
            positions.append(torch.arange(first, first + len(completion)))
        attention_mask = (torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)).long()
        made = self._micro_batch(rollouts, totals, group_size, input_ids, attention_mask, positions, targets)
        beside = features.joined([r.prompt.images for r in rollouts], longest)
        made.features = {name: self._sent(value) for name, value in beside.items()}
        return made

    def packed_micro_batch(
        self, rollouts: list[Rollout], totals: StepTotals, group_size: int = 1, *, share: bool = False
    ) -> MicroBatch:
        """The tensors of these rollouts in one row; with `share`, neighbours with the same prompt share it."""
        ids: list[int] = []
        segments: list[Segment] = []
        position_ids, positions = [], []
        shared = shared_with_previous(rollouts) if share else [False] * len(rollouts)
        prompt_end = parent = 0
        for i, rollout in enumerate(rollouts):
            prompt, completion = rollout.prompt.ids, rollout.completion.ids
            shares = shared[i] or (i + 1 < len(rollouts) and shared[i + 1])
            if not shared[i]:
                ids += prompt
                prompt_end = len(ids)
                position_ids.append(torch.arange(len(prompt)))
                if shares:
                    parent = len(segments)
                    segments.append(Segment(len(prompt)))
            start = len(ids)
            ids += self._seen(completion)
            position_ids.append(torch.arange(len(prompt), len(prompt) + len(completion)))
            # The first token is predicted from the prompt's last, which may stand further left.
            predicted_from = torch.arange(start - 1, len(ids) - 1)
            predicted_from[:1] = prompt_end - 1
            positions.append(predicted_from)
            if not shares:
                segments.append(Segment(len(prompt) + len(completion)))
            elif completion:
                segments.append(Segment(len(completion), parent))
        padding = self._rounded(len(ids)) - len(ids)
        mask = torch.ones(1, len(ids) + padding, dtype=torch.long)
        if padding:
            mask[:, len(ids) :] = 0
            ids += [self.pad_token_id] * padding
            position_ids.append(torch.arange(padding))
            segments.append(Segment(padding))
        input_ids = torch.tensor([ids])
        targets = [torch.tensor(r.completion.ids, dtype=torch.long) for r in rollouts]
        made = self._micro_batch(rollouts, totals, group_size, input_ids, mask, positions, targets)
        made.position_ids_BT = self._sent(torch.cat(position_ids).unsqueeze(0))
        made.layout = Layout(tuple(segments), self.device)
        if self.device.type == "cuda":
            made.layout.prepare()
        return made

    def trial(self, rollouts: Sequence[Rollout], tokens: int, group_size: int = 1) -> MicroBatch:
        """One packed micro-batch of `tokens` tokens at most, or a single group: of these rollouts, again and again."""
        groups = [list(rollouts[i : i + group_size]) for i in range(0, len(rollouts), group_size)]
        share = self._line_up(groups)
        repeats = tokens // max(1, sum(costs(groups, share)[1])) + 1
        groups *= repeats
        count = pieces_within(*costs(groups, share), tokens)[0]
        chosen = [r for g in groups[:count] for r in g]
        return self.packed_micro_batch(chosen, StepTotals(len(chosen), 1.0, 1), group_size, share=share)

    def _line_up(self, groups: list[list[Rollout]]) -> bool:
        """Put groups of one prompt next to each other; returns whether sharing it is worth it."""
        # Otherwise in the order that they came in.
        first: dict[tuple[int, ...], int] = {}
        groups.sort(key=lambda g: first.setdefault(tuple(g[0].prompt.ids), len(first)))
        return self.share_prompts and saving([r for g in groups for r in g]) > LEAST_SAVING

    def _pack_rows(self, groups: list[list[Rollout]], totals: StepTotals, group_size: int) -> Iterator[MicroBatch]:
        share = self._line_up(groups)
        opening, following = costs(groups, share)
        most = self.max_tokens or self.rows * max((tokens_of(r) for g in groups for r in g), default=0)
        count = self.agree(len(pieces_within(opening, following, most)))
        start = 0
        for size in balanced_pieces(opening, following, count):
            rollouts = [r for g in groups[start : start + size] for r in g]
            yield self.packed_micro_batch(rollouts, totals, group_size, share=share)
            start += size

    def _micro_batch(
        self,
        rollouts: list[Rollout],
        totals: StepTotals,
        group_size: int,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: list[Tensor],
        targets: list[Tensor],
    ) -> MicroBatch:
        lengths = torch.tensor([len(r.completion.ids) for r in rollouts])
        return MicroBatch(
            rollouts=rollouts,
            input_ids_BT=self._sent(input_ids),
            attention_mask_BT=self._sent(attention_mask),
            positions_N=self._sent(torch.cat(positions)),
            targets_N=self._sent(torch.cat(targets)),
            rows_N=self._sent(torch.arange(len(rollouts)).repeat_interleave(lengths)),
            mask_N=self._sent(torch.cat([loss_mask(r) for r in rollouts])),
            advantages_B=self._sent(torch.tensor([r.advantage for r in rollouts], dtype=torch.float32)),
            totals=totals,
            per_token=self._per_token(rollouts),
            group_size=group_size,
        )

    def _per_token(self, rollouts: list[Rollout]) -> dict[str, Tensor]:
        values = {}
        for name in PER_TOKEN:
            if all(name in r.extra for r in rollouts):
                values[name] = self._sent(torch.cat([r.extra[name] for r in rollouts]))
        return values

    def _seen(self, completion: list[int]) -> list[int]:
        """The tokens of a completion as the model is given them."""
        if self.placeholders and completion and completion[-1] in self.placeholders:
            return [*completion[:-1], self.pad_token_id]
        return completion

    def _sent(self, made: Tensor) -> Tensor:
        return sent(made, self.device)

    def _rounded(self, tokens: int) -> int:
        return -(-tokens // self.multiple) * self.multiple


def _cut(groups: list[list[Rollout]], count: int) -> list[list[list[Rollout]]]:
    return [groups[start : start + count] for start in range(0, len(groups), count)]
