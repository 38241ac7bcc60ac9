"""What a rollout function returns is checked, and every message says what is wrong."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from slipstream.modeling.packing import Packer, loss_mask
from slipstream.records import Completion, Prompt, Rollout, StepTotals
from slipstream.rollouts.custom import sample
from slipstream.rollouts.stored import pack, plain, unpack

ROWS = [{"prompt": [{"role": "user", "content": "a"}], "answer": 1}, {"prompt": "b", "answer": 2}]
GOOD = {
    "prompt_ids": [[1], [1, 2], [3]],
    "completion_ids": [[4, 5], [6], [7, 8, 9]],
    "logprobs": [[-0.1, -0.2], [-0.3], [-0.4, -0.5, -0.6]],
}


def sampled(**changes):
    return sample(lambda prompts, trainer: GOOD | changes, None, ROWS, [(0, 0, 2), (1, 3, 1)], 7)


def test_prompts_come_once_for_each_of_their_completions():
    seen = []

    def function(prompts, trainer):
        seen.append((list(prompts), trainer))
        prompts[0].append({"role": "assistant", "content": "x"})
        return GOOD

    sample(function, "the trainer", ROWS, [(0, 0, 2), (1, 3, 1)], 7)
    [(prompts, trainer)] = seen
    assert trainer == "the trainer"
    assert [p if isinstance(p, str) else len(p) for p in prompts] == [2, 1, "b"], "each has a copy"
    assert len(ROWS[0]["prompt"]) == 1


def test_what_it_returns_becomes_prompts_and_completions():
    made = sampled(env_mask=[[1, 0], [1], [0, 0, 1]], score=[0.5, None, 2], task="sum")
    assert [p.ids for p, _, _ in made] == GOOD["prompt_ids"]
    assert [p.index for p, _, _ in made] == [0, 0, 1]
    assert [p.row for p, _, _ in made] == [
        ROWS[i] | {"score": score, "task": "sum"} for i, score in ((0, 0.5), (0, None), (1, 2))
    ]
    assert [c for _, c, _ in made] == [
        Completion(ids, logps, 7, "stop") for ids, logps in zip(GOOD["completion_ids"], GOOD["logprobs"], strict=True)
    ]
    assert [e["loss_mask"].tolist() for _, _, e in made] == [[1, 0], [1], [0, 0, 1]]


def test_log_probabilities_may_be_unknown():
    assert [c.logprobs for _, c, _ in sampled(logprobs=None)] == [None] * 3
    [_, (_, one, extra), _] = sampled(logprobs=[[-0.1, -0.2], [None], [-0.4, -0.5, -0.6]])
    assert math.isnan(one.logprobs[0])
    assert extra == {}


def test_arrays_and_tensors_are_lists():
    made = sampled(prompt_ids=[numpy.array([1]), (1, 2), torch.tensor([3])])
    assert [p.ids for p, _, _ in made] == GOOD["prompt_ids"]
    assert all(type(token) is int for p, _, _ in made for token in p.ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": [[1]]}, "1 entries of 'prompt_ids' for 3 prompts"),
        ({"completion_ids": [[1]] * 4}, "4 entries of 'completion_ids' for 3 prompts"),
        ({"logprobs": [[-0.1, -0.2]]}, "1 entries of 'logprobs' for 3 prompts"),
        ({"env_mask": [[1, 1]]}, "1 entries of 'env_mask' for 3 prompts"),
        ({"score": [1.0, 2.0]}, "2 entries of 'score' for 3 prompts"),
        ({"completion_ids": "abc"}, "returned str as completion_ids: it must be a list"),
        ({"completion_ids": [[4, 5], 6, [7, 8, 9]]}, r"returned int as completion_ids\[1\]: it must be a list"),
        (
            {"completion_ids": [[4, 5], [6.0], [7, 8, 9]]},
            r"returned 6.0 in completion_ids\[1\]: token ids are integers",
        ),
        ({"completion_ids": [[4, 5], [True], [7, 8, 9]]}, r"returned True in completion_ids\[1\]"),
        ({"prompt_ids": [[1], [-2], [3]]}, r"returned -2 in prompt_ids\[1\]: token ids are integers >= 0"),
        ({"prompt_ids": [[1], [], [3]]}, r"an empty prompt_ids\[1\]"),
        ({"completion_ids": [[4, 5], [6], []]}, r"an empty completion_ids\[2\]"),
        (
            {"logprobs": [[-0.1], [-0.3], [-0.4, -0.5, -0.6]]},
            r"1 values in logprobs\[0\] for the 2 tokens of completion",
        ),
        ({"logprobs": [[-0.1, "x"], [-0.3], [-0.4] * 3]}, r"returned 'x' in logprobs\[0\]"),
        ({"logprobs": [[[-0.1], [-0.2]], [-0.3], [-0.4] * 3]}, r"returned \[-0.1\] in logprobs\[0\]"),
        ({"env_mask": [[1, 1], [1], [1, 1]]}, r"2 values in env_mask\[2\] for the 3 tokens"),
        ({"env_mask": [[1, 0.5], [1], [1, 1, 1]]}, r"returned 0.5 in env_mask\[0\]: it must be 1 for"),
        ({"prompts": [1, 2, 3]}, "returned 'prompts', which the reward functions get from the trainer"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        sampled(**changes)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([], "rollout_func returned list: it must return a dict with 'prompt_ids', 'completion_ids', 'logprobs'"),
        ({"completion_ids": []}, "rollout_func returned no 'prompt_ids', 'logprobs': it must"),
    ],
)
def test_missing_keys_are_named(output, message):
    with pytest.raises(ValueError, match=message):
        sample(lambda prompts, trainer: output, None, ROWS, [(0, 0, 1)], 0)


def rollouts(in_loss=True):
    made = sampled(env_mask=[[1, 0], [1], [0, 0, 1]])
    return [Rollout(p, c, "", False, in_loss=in_loss, extra=extra) for p, c, extra in made]


def test_only_the_policys_own_tokens_enter_the_loss():
    assert [r.own_tokens for r in rollouts()] == [1, 1, 1]
    [batch] = Packer(3, 0, torch.device("cpu")).pack(rollouts(), StepTotals(3, 3.0, 1))
    masks = [m.tolist() for m in batch.split_rows(batch.mask_N)]
    assert masks == [loss_mask(r).tolist() for r in batch.rollouts]
    assert sorted(masks) == [[0, 0, 1], [1], [1, 0]]
    assert [loss_mask(r).sum() for r in rollouts(in_loss=False)] == [0, 0, 0]


def test_prompts_that_differ_within_a_row_survive_a_checkpoint(tmp_path):
    torch.save(plain(pack(rollouts()), "x"), tmp_path / "x")
    packed = torch.load(tmp_path / "x", weights_only=True)
    after = unpack(packed, lambda i: Prompt([], ROWS[i], i, rendered=False), torch.device("cpu"))
    assert [r.prompt.ids for r in after] == GOOD["prompt_ids"]
    assert [r.own_tokens for r in after] == [1, 1, 1]
    assert not any(r.prompt.rendered for r in after)
