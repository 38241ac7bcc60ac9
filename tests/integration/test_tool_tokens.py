"""What the model samples between calls of tools, token by token, under both engines in this process."""

from __future__ import annotations

from importlib.util import find_spec

import calling
import engines
import pytest
import torch
from calling import CONVERSATIONS, sampled

from slipstream.modeling.logprobs import PolicyOutput
from slipstream.trainers.metrics import Tally

VLLM = find_spec("vllm") is not None


@pytest.fixture(
    scope="module",
    params=["transformers", pytest.param("vllm", marks=pytest.mark.skipif(not VLLM, reason="vLLM is not installed"))],
)
def trainer(request, calling_model, tmp_path_factory):
    """Evaluates with greedy decoding, which gives the conversations that the model knows."""
    made = calling.trainer(
        calling_model, tmp_path_factory.mktemp("run"), temperature=1.2, eval_temperature=0.0,
        use_vllm=request.param == "vllm", vllm_max_model_length=256,
    )  # fmt: skip
    with made._engine_ready():
        yield made
    made.close()


def test_tokens_are_those_of_the_whole_conversation(trainer):
    words = trainer.processing_class
    for rollout, (prompt, answers) in zip(sampled(trainer), CONVERSATIONS.values(), strict=True):
        assert rollout.text == answers
        whole = words.apply_chat_template([*prompt, *answers], tools=calling.schemas(), return_dict=False)
        ids = rollout.prompt.ids + rollout.completion.ids
        assert whole[: len(ids)] == ids
        assert words.decode(whole[len(ids) :]) == "\n"
        assert not rollout.truncated


def test_only_its_own_tokens_are_in_the_loss(trainer):
    words = trainer.processing_class
    for rollout, (_, answers) in zip(sampled(trainer), CONVERSATIONS.values(), strict=True):
        mask, ids = rollout.extra["loss_mask"].bool(), torch.tensor(rollout.completion.ids)
        own = words.apply_chat_template([a for a in answers if a["role"] == "assistant"], tokenize=False)
        assert words.decode(ids[mask]) == own.replace("<assistant>", "").replace("\n", "")
        between = "\n<tool>3<end>\n<assistant>"
        assert words.decode(ids[~mask]) == between * sum(a["role"] == "tool" for a in answers)
        assert rollout.own_tokens == mask.sum()


def test_log_probabilities_are_the_trainers(trainer):
    rollouts = sampled(trainer, rows=range(3), evaluation=False, count=6)
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert len({tuple(r.completion.ids) for r in rollouts}) > 3, "they differ at this temperature"
    assert sum(r.extra["tool_calls"] for r in rollouts) > 3
    for rollout in rollouts:
        if not trainer.args.use_vllm:
            assert "sampler_logps" not in rollout.extra, "as without tools"
            continue
        own = rollout.extra["loss_mask"].bool()
        expected = engines.logprobs(model, rollout.prompt.ids, rollout.completion.ids, 1.2)
        found = rollout.extra["sampler_logps"]
        assert (expected - found)[own].abs().max() < 1e-4
        assert found.isnan().equal(~own)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"vllm_importance_sampling_mode": "token_truncate", "entropy_coef": 0.1, "top_entropy_quantile": 0.5},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "off_policy_mask_threshold": 0.1, "beta": 0.1},
    ],
)
def test_the_loss_does_not_look_at_other_tokens(trainer, values, monkeypatch):
    """Nor at their log-probabilities under the sampler, which nobody knows."""
    rollouts = sampled(trainer)
    for name, value in values.items():
        monkeypatch.setattr(trainer.args, name, value)
    losses, gradients = [], []
    for change in (0.0, 5.0):
        for i, rollout in enumerate(rollouts):
            rollout.advantage = (1.0, -0.5, -1.0)[i]
            own, tokens = rollout.extra["loss_mask"], len(rollout.completion.ids)
            generator = torch.Generator().manual_seed(i)
            rollout.extra["old_logps"] = torch.randn(tokens, generator=generator) + change * (1 - own)
            rollout.extra["ref_logps"] = torch.randn(tokens, generator=generator) + change * (1 - own)
            rollout.extra["sampler_logps"] = torch.where(own > 0, rollout.extra["old_logps"] - 0.1, torch.nan)
        batch = trainer.packer.micro_batch(rollouts, trainer._totals(rollouts))
        generator = torch.Generator().manual_seed(9)
        logps, entropies = torch.randn(2, len(batch.mask_N), generator=generator).abs() * torch.tensor([[-1.0], [1.0]])
        logps = (logps + change * (1 - batch.mask_N)).requires_grad_()
        entropies = (entropies + change * (1 - batch.mask_N)).requires_grad_()
        tally = Tally()
        loss = trainer.objective(PolicyOutput(logps, entropies), batch, tally)
        loss.backward()
        losses.append((loss.item(), tally.reduce(trainer.accelerator)))
        gradients.append(logps.grad)
        assert logps.grad.any()
        assert not logps.grad[batch.mask_N == 0].any()
        assert entropies.grad is None or not entropies.grad[batch.mask_N == 0].any()
    assert losses[0] == losses[1]
    assert torch.equal(*gradients)
