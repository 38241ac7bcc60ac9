"""What rollouts cost in tokens, and what is saved where neighbours share a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from slipstream.records import Rollout


def tokens_of(rollout: Rollout) -> int:
    return len(rollout.prompt.ids) + len(rollout.completion.ids)


def shared_with_previous(rollouts: Sequence[Rollout]) -> list[bool]:
    """For each rollout whether the one before it has the same prompt."""
    prompts = [r.prompt for r in rollouts]
    # Rollouts of a group have the same object, which is quicker to see than equal token ids.
    return [i > 0 and (p is prompts[i - 1] or p.ids == prompts[i - 1].ids) for i, p in enumerate(prompts)]


def saving(rollouts: Sequence[Rollout]) -> float:
    """The part of all tokens that are prompts which the rollout before has already."""
    tokens = sum(map(tokens_of, rollouts))
    pairs = zip(rollouts, shared_with_previous(rollouts), strict=True)
    return sum(len(r.prompt.ids) for r, shared in pairs if shared) / max(tokens, 1)


def costs(groups: Sequence[Sequence[Rollout]], share: bool) -> tuple[list[int], list[int]]:
    """Tokens of each group as the first of a row, and behind the group before it."""
    opening, following = [], []
    previous: Rollout | None = None
    for group in groups:
        own = sum(map(tokens_of, group))
        repeated = 0
        if share:
            own -= sum(len(r.prompt.ids) for r, same in zip(group, shared_with_previous(group), strict=True) if same)
            if previous is not None and shared_with_previous([previous, group[0]])[1]:
                repeated = len(group[0].prompt.ids)
        opening.append(own)
        following.append(own - repeated)
        previous = group[-1]
    return opening, following
