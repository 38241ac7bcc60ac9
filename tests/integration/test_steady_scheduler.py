"""Steady steps of vLLM's schedulers with a make-believe model, while requests come, are dropped and put aside.

What a GPU has is asynchronous scheduling for the second model runner, and vLLM's CPU worker knows neither. So no model
runs here: a runner keeps what such a one keeps, and checks each step against it and against what the cache holds.
"""

from __future__ import annotations

import collections
import random
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from slipstream.generation.guest import Guest
from slipstream.vllm_compat import load, steady, steady_prefixes

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

BLOCK, LONGEST = 16, 192
METADATA = "what the encoder cache's manager has to say in every step"


def token(name, position):
    """The token that a sequence has at a position, whenever it is sampled."""
    return random.Random(f"{name} {position}").randrange(5, 60)


def completion(name, prompt, params):
    """Token ids of a request, and why it ends."""
    ids = []
    while True:
        ids.append(token(name, len(prompt) + len(ids)))
        if ids[-1] in params.stop_token_ids:
            return ids, "stop"
        if len(ids) == params.max_tokens or len(prompt) + len(ids) == LONGEST:
            return ids, "length"


class Runner:
    """A model runner without a model: keys and values are the tokens that they come from."""

    def __init__(self):
        self.cache, self.sequences = {}, {}
        self.saved = 0
        """Tokens that were read for several sequences at once."""

    def run(self, step):
        from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

        for name in [*step.finished_req_ids, *(step.preempted_req_ids or ())]:
            self.sequences.pop(name, None)
        for new in step.scheduled_new_reqs:
            self.sequences[new.req_id] = SimpleNamespace(
                tokens=list(new.prefill_token_ids), computed=new.num_computed_tokens, blocks=list(new.block_ids[0]),
                prompt=len(new.prompt_token_ids),
            )  # fmt: skip
        known = step.scheduled_cached_reqs
        columns = known.req_ids, known.num_computed_tokens, known.num_output_tokens, known.new_block_ids
        for name, computed, outputs, blocks in zip(*columns, strict=True):
            sequence = self.sequences[name]
            assert (computed, outputs) == (sequence.computed, len(sequence.tokens) - sequence.prompt)
            sequence.blocks += blocks[0] if blocks is not None else []
        assert getattr(step, "ec_manager_metadata", METADATA) == METADATA  # 0.26 has none
        names = list(step.num_scheduled_tokens)
        self._read_together(names, getattr(step, "slipstream_prefixes", None))
        sampled = [self._compute(name, count) for name, count in step.num_scheduled_tokens.items()]
        ids = np.array([tokens[0] if tokens else 0 for tokens in sampled])
        return ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: place for place, name in enumerate(names)}, sampled_token_ids=sampled,
            logprobs=LogprobsLists(ids[:, None], -ids[:, None].astype(np.float32), ids) if names else None,
        )  # fmt: skip

    def _read_together(self, names, prefixes):
        """What a step says that its sequences have in common lies in the same places, for all of them."""
        if prefixes is None:
            return
        groups, saved = prefixes.read(3)
        assert groups.shape == (2, len(names))
        self.saved += saved
        for place, (members, common) in enumerate(groups.T.tolist()):
            first = self.sequences[names[place]]
            for name in names[place : place + members]:
                other = self.sequences[name]
                assert common <= other.computed
                assert other.tokens[:common] == first.tokens[:common]
                assert other.blocks[: common // BLOCK] == first.blocks[: common // BLOCK]

    def _compute(self, name, count):
        sequence = self.sequences[name]
        tokens, begin = sequence.tokens, sequence.computed
        for place in [*range(0, begin, 5), *range(begin, begin + count)]:
            slot, upto = (sequence.blocks[place // BLOCK], place % BLOCK), hash(tuple(tokens[: place + 1]))
            if place >= begin:
                self.cache[slot] = upto
            assert self.cache[slot] == upto, f"{name} reads another's keys and values at {place}"
        sequence.computed += count
        if sequence.computed < len(tokens):
            return []
        tokens.append(token(name, len(tokens)))
        return tokens[-1:]


def scheduler_of(path, *, asynchronous, blocks, caching):
    """vLLM's scheduler of sixteen sequences and a cache of so many blocks, with steady steps."""
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config = VllmConfig(
        model_config=ModelConfig(str(path), dtype="float32", max_model_len=LONGEST, skip_tokenizer_init=True),
        scheduler_config=SchedulerConfig(
            max_num_seqs=16, max_num_batched_tokens=256, max_model_len=LONGEST, is_encoder_decoder=False,
            async_scheduling=asynchronous,
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=caching),
    )  # fmt: skip
    config.cache_config.num_gpu_blocks = blocks
    layers = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    scheduler = (AsyncScheduler if asynchronous else Scheduler)(
        vllm_config=config, structured_output_manager=StructuredOutputManager(config), block_size=BLOCK,
        kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], layers)]),
    )  # fmt: skip
    scheduler.use_v2_model_runner = True
    scheduler.encoder_cache_manager.get_manager_metadata = lambda: METADATA
    core = SimpleNamespace(scheduler=scheduler, model_executor=None)
    assert steady.install(core, load().__version__) is None
    scheduler.schedule.__self__.prefixes = True
    return core


def requests_of(rng, count, caching):
    """Requests by name, of a few prompts, and their completions."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    prompts = [[rng.randrange(5, 99) for _ in range(rng.randrange(1, 60))] for _ in range(8)]
    requests, expected, prompt = [], {}, prompts[0]
    for number in range(count):
        name, prompt = f"request {number}", prompt if rng.random() < 0.7 else rng.choice(prompts)
        params = SamplingParams(
            max_tokens=rng.choice([1, 40, 90, 150, 400]), stop_token_ids=rng.choice([[], [7], [7, 30]]), logprobs=0,
            # Who wants each token as it comes leaves no step to be steady.
            output_kind=RequestOutputKind.DELTA if rng.random() < 0.03 else RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        expected[name] = completion(name, prompt, params)
        hasher = get_request_block_hasher(BLOCK, sha256) if caching else None
        requests.append(Request(name, prompt, params, None, block_hasher=hasher))
    return requests, expected


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize("seed", range(8))
def test_every_request_has_its_tokens(tiny_model, monkeypatch, asynchronous, seed):
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.request import RequestStatus

    monkeypatch.setattr(steady_prefixes, "LEAST", BLOCK)
    rng = random.Random(seed)
    caching, blocks = seed % 4 != 0, (40, 60, 400)[seed % 3]  # 16 sequences of 192 tokens have 192
    with Guest().inside():
        core = scheduler_of(tiny_model, asynchronous=asynchronous, blocks=blocks, caching=caching)
    scheduler, runner = core.scheduler, Runner()
    requests, expected = requests_of(rng, 50, caching)
    told, ends, dropped = collections.defaultdict(list), {}, set()
    under_way, steady_steps = collections.deque(), 0

    def disturb():
        what = rng.choice(["drop", "ask", "ask", "forget", "start again", "pause"])
        if what == "drop" and scheduler.requests:
            dropped.add(name := rng.choice(sorted(scheduler.requests)))
            scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        elif what == "ask":
            for name, count in steady.tokens_so_far(core).items():
                request = scheduler.requests[name]
                assert list(request.output_token_ids) == expected[name][0][:count]
                assert len(request.block_hashes) == (request.num_tokens // BLOCK if caching else 0)
        elif what in ("forget", "start again"):
            scheduler.reset_prefix_cache(reset_running_requests=what == "start again")
        elif what == "pause":
            scheduler.set_pause_state(rng.choice([PauseState.PAUSED_ALL, PauseState.PAUSED_NEW]))

    while requests or under_way or scheduler.has_requests() or scheduler.pause_state != PauseState.UNPAUSED:
        if requests and (rng.random() < 0.05 or not scheduler.has_requests()):
            for request in [requests.pop() for _ in range(min(len(requests), rng.choice([1, 4, 20])))]:
                scheduler.add_request(request)
        if scheduler.pause_state != PauseState.UNPAUSED and rng.random() < 0.2:
            scheduler.set_pause_state(PauseState.UNPAUSED)
        if scheduler.has_requests():
            step = scheduler.schedule()
            steady_steps += hasattr(step, "slipstream_steady")
            under_way.append((step, runner.run(step)))
            if asynchronous and len(under_way) < 2 and step.num_scheduled_tokens:
                continue
        if under_way:
            step, output = under_way.popleft()
            if rng.random() < 0.05:
                disturb()
            for outputs in scheduler.update_from_output(step, output).values():
                for part in outputs.outputs:
                    told[part.request_id] += part.new_token_ids
                    if (logprobs := part.new_logprobs) is not None:
                        assert logprobs.logprobs[:, 0].tolist() == [-i for i in part.new_token_ids]
                        assert logprobs.sampled_token_ranks.tolist() == part.new_token_ids
                    if part.finish_reason is not None:
                        ends[part.request_id] = str(part.finish_reason)
    assert steady_steps > 50
    assert (runner.saved > 0) == caching
    for name in expected.keys() - dropped:
        assert (told[name], ends[name]) == expected[name], name
    assert not scheduler.requests
    assert not scheduler.update_from_output.__self__.unsent
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
