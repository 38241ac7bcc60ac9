"""Packed micro-batches: what they hold, how they are balanced, and that ranks make equally many."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.modeling.packing import Packer
from slipstream.modeling.partition import balanced_pieces, pieces_within
from slipstream.records import Completion, Prompt, Rollout, Segment, StepTotals

TOTALS = StepTotals(rows=9, tokens=1.0, ranks=1)
CPU = torch.device("cpu")


def rollouts_of(groups):
    """`groups`: (prompt length, completion lengths); every token id is used once."""
    numbers = itertools.count(1)
    made = []
    for i, (p, completions) in enumerate(groups):
        prompt = Prompt([next(numbers) for _ in range(p)], {}, i)
        for c in completions:
            completion = Completion([next(numbers) for _ in range(c)], None, 0, "stop")
            made.append(Rollout(prompt, completion, "", False, advantage=float(len(made))))
            made[-1].extra["old_logps"] = torch.tensor(completion.ids, dtype=torch.float32)
    return made


GROUPS = [(5, [3, 1, 4]), (2, [6]), (7, [2, 2])]


def packer(**options):
    return Packer(3, 0, CPU, **{"packed": True} | options)


def context(batch, column):
    """Token ids that the token in `column` of a packed row sees, itself included, by the meaning of segments."""
    ids = batch.input_ids_BT[0].tolist()
    start = 0
    starts = []
    for segment in batch.segments:
        starts.append(start)
        start += segment.length
    number = max(i for i, s in enumerate(starts) if s <= column)
    parent = batch.segments[number].parent
    seen = [] if parent is None else ids[starts[parent] : starts[parent] + batch.segments[parent].length]
    return seen + ids[starts[number] : column + 1]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("multiple", [None, 16])
@pytest.mark.parametrize("max_tokens", [1, 20, 999])
def test_every_token_is_predicted_from_what_stands_before_it(share, multiple, max_tokens):
    rollouts = rollouts_of(GROUPS)
    seen = []
    options = {"pad_to_multiple_of": multiple, "share_prompts": share, "max_tokens": max_tokens}
    for batch in packer(**options).pack(rollouts, TOTALS):
        assert sum(s.length for s in batch.segments) == batch.input_ids_BT.shape[1]
        assert batch.input_ids_BT.shape[1] % (multiple or 1) == 0
        for i, rollout in enumerate(batch.rollouts):
            own = batch.rows_N == i
            assert batch.targets_N[own].tolist() == rollout.completion.ids
            assert batch.per_token["old_logps"][own].tolist() == rollout.completion.ids
            assert batch.advantages_B[i] == rollout.advantage
            for j, position in enumerate(batch.positions_N[own].tolist()):
                text = rollout.prompt.ids + rollout.completion.ids[:j]
                assert context(batch, position) == text
                assert batch.position_ids_BT[0, position] == len(text) - 1
        real = batch.attention_mask_BT.bool()
        assert (batch.input_ids_BT[real] > 0).all()
        assert not batch.input_ids_BT[~real].any()
        seen += batch.rollouts
    assert sorted(map(id, seen)) == sorted(map(id, rollouts))


def test_a_shared_prompt_stands_there_once():
    rollouts = rollouts_of(GROUPS)
    (batch,) = packer(share_prompts=True, max_tokens=999).pack(rollouts, TOTALS)
    assert batch.segments == (
        Segment(5), Segment(3, 0), Segment(1, 0), Segment(4, 0), Segment(8), Segment(7), Segment(2, 5), Segment(2, 5),
    )  # fmt: skip
    assert batch.input_ids_BT.numel() == 5 + 8 + 8 + 7 + 4


def test_prompts_are_shared_when_that_saves_a_tenth():
    for prompt, worthwhile in ((9, False), (14, True)):
        rollouts = rollouts_of([(prompt, [50, 50])])
        (batch,) = packer(share_prompts=True, max_tokens=999).pack(rollouts, TOTALS)
        assert any(s.parent is not None for s in batch.segments) == worthwhile
        assert batch.input_ids_BT.numel() == 100 + (1 if worthwhile else 2) * prompt


def test_equal_prompts_are_shared_even_if_they_are_two_objects():
    rollouts = rollouts_of([(5, [3]), (2, [1]), (5, [4])])
    rollouts[2].prompt = Prompt(list(rollouts[0].prompt.ids), {}, 7)
    (batch,) = packer(share_prompts=True, max_tokens=999).pack(rollouts, TOTALS)
    assert batch.rollouts == [rollouts[0], rollouts[2], rollouts[1]]
    assert batch.segments == (Segment(5), Segment(3, 0), Segment(4, 0), Segment(3))


def test_a_group_that_is_cut_repeats_its_prompt():
    rollouts = rollouts_of([(6, [4, 4, 4, 4])])
    batches = list(packer(share_prompts=True, max_tokens=14).pack(rollouts, TOTALS))
    assert [b.input_ids_BT.numel() for b in batches] == [14, 14]
    assert [b.segments[0].length for b in batches] == [6, 6]


def test_empty_completions():
    rollouts = rollouts_of([(3, [0, 2, 0]), (2, [0])])
    (batch,) = packer(share_prompts=True, max_tokens=99).pack(rollouts, TOTALS)
    assert batch.segments == (Segment(3), Segment(2, 0), Segment(2))
    assert [len(v) for v in batch.split_rows(batch.targets_N)] == [0, 2, 0, 0]
    assert batch.positions_N.tolist() == [2, 3]


def test_groups_that_a_loss_compares_stay_together():
    rollouts = rollouts_of([(5, [9, 1]), (2, [3, 3]), (4, [8, 8])])
    batches = list(packer(share_prompts=True, max_tokens=1).pack(rollouts, TOTALS, group_size=2))
    assert [len(b.rollouts) for b in batches] == [2, 2, 2]
    assert all(b.group_size == 2 and b.rollouts[0].prompt is b.rollouts[1].prompt for b in batches)


def test_the_budget_is_that_of_padded_rows_if_none_is_given():
    rollouts = rollouts_of([(4, [6, 1, 1, 1, 1, 1]), (1, [1, 1, 1])])
    batches = list(packer().pack(rollouts, TOTALS))
    assert max(b.input_ids_BT.numel() for b in batches) <= 3 * 10
    assert len(batches) == 2


def test_ranks_make_equally_many_micro_batches():
    ranks = [rollouts_of([(2, [30, 30, 30, 30])]), rollouts_of([(2, [1, 2, 3, 4])])]
    needed = []

    def note(count):
        needed.append(count)
        return count

    for rollouts in ranks:
        list(packer(max_tokens=40, agree=note).pack(rollouts, TOTALS))
    assert needed == [4, 1]
    sizes = [len(list(packer(max_tokens=40, agree=lambda n: max(needed)).pack(r, TOTALS))) for r in ranks]
    assert sizes == [4, 4]


def test_the_same_rollouts_make_the_same_micro_batches():
    made = [
        [b.input_ids_BT.tolist() for b in packer(share_prompts=True, max_tokens=20).pack(rollouts_of(GROUPS), TOTALS)]
        for _ in range(2)
    ]
    assert made[0] == made[1]


# Partition -------------------------------------------------------------------------------------------------------

# What a unit costs, and how much more as the first.
alone = st.lists(st.tuples(st.integers(1, 50), st.just(0)), min_size=1, max_size=9)
sharing = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 40)), min_size=1, max_size=9)


def costs_of(sizes, opening, following):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [opening[s] + sum(following[s + 1 : s + n]) for s, n in zip(starts, sizes, strict=True)]


@given(alone | sharing, st.data())
def test_pieces_are_as_even_as_can_be(pairs, data):
    opening, following = [a + b for a, b in pairs], [a for a, _ in pairs]
    count = data.draw(st.integers(1, len(pairs)))
    sizes = balanced_pieces(opening, following, count)
    assert len(sizes) == count
    assert min(sizes) >= 1
    assert sum(sizes) == len(pairs)
    # Against every way to cut.
    best = min(
        max(costs_of([b - a for a, b in itertools.pairwise((0, *cuts, len(pairs)))], opening, following))
        for cuts in itertools.combinations(range(1, len(pairs)), count - 1)
    )
    assert best <= max(costs_of(sizes, opening, following)) <= best + 2 * max(b for _, b in pairs)


@given(alone | sharing, st.integers(1, 120))
def test_pieces_keep_to_the_budget(pairs, most):
    opening, following = [a + b for a, b in pairs], [a for a, _ in pairs]
    sizes = pieces_within(opening, following, most)
    assert sum(sizes) == len(pairs)
    for size, cost in zip(sizes, costs_of(sizes, opening, following), strict=True):
        assert cost <= most or size == 1


def test_more_micro_batches_than_rollouts_is_an_error():
    with pytest.raises(ValueError, match="2 rollouts or groups cannot make 3 micro-batches"):
        balanced_pieces([5, 5], [5, 5], 3)
