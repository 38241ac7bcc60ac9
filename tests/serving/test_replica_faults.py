"""A replica's engine in this process, in its thread: what becomes of everybody when an update or the engine fails."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import Future
from importlib.util import find_spec
from types import SimpleNamespace

import httpx
import pytest
import torch
import torch.distributed as dist
from integration import engines
from replica_client import ENGINE, OFFSET, completions, prompt, shared_file

from slipstream.generation.guest import Guest
from slipstream.serving import replica, wire
from slipstream.weights.buckets import specs_of
from slipstream.weights.export import named_tensors
from slipstream.weights.plan import WeightUpdateError
from slipstream.weights.transports import group as process_group
from slipstream.weights.transports.shared_memory import Writer

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

PROMPTS = engines.prompts(2, 20)
LONG = wire.SamplingMessage(max_tokens=200, extra={"ignore_eos": True})


class Parts:
    """A replica's parts, without its socket."""

    def __init__(self, model):
        from slipstream.serving.replica_app import Replica

        self.engine = replica.start_engine({"model": str(model)} | ENGINE, reference=True)
        routes = Replica(self.engine, reference=True)
        self.generation, self.weights, self.turns = routes._generation, routes._weights, routes._turns

    async def generate(self, sampling, *prompts, update=None):
        message = wire.GenerateMessage(prompts=list(prompts), sampling=sampling, update=update)
        mixture = prompts[0].mixture
        reader, frames = wire.FrameReader(), []
        with await self.turns.enter(mixture) as turn:
            begun = await self.generation.begin(message, lambda: self.weights.serving(None, mixture))
            async for piece in self.generation.stream(*begun, turn):
                frames += reader.feed(piece)
        reader.finish()
        return completions(message, frames)

    async def push(self, version, model, reference=False):
        tensors = list(named_tensors(model))
        specs = specs_of(tensors, "float32")
        with shared_file(specs) as (path, nonce):
            begin = wire.BeginMessage(version=version, tensors=specs, reference=reference)
            order = wire.ReplicaBegin(transaction=version, update="an update", begin=begin, path=path, offset=OFFSET)
            await self.weights.begin(order)
            with Writer(path, nonce, OFFSET, specs) as writer:
                checksums = writer.write(tensors)
            return await self.weights.commit(wire.ReplicaCommit(transaction=version, checksums=checksums))

    async def sampling(self):
        """Wait until something is sampled."""
        from slipstream.vllm_compat.async_engine import tokens_so_far

        async with asyncio.timeout(60):
            while not any((await tokens_so_far(self.engine)).values()):
                await asyncio.sleep(0.005)


@pytest.fixture(scope="module", autouse=True)
def guest():
    """A replica owns its process and may do with it as it likes. This one is the tests'."""
    with Guest().inside():
        yield


@pytest.fixture(scope="module")
def parts(tiny_model):
    started = Parts(tiny_model)
    yield started
    started.engine.shutdown()
    assert not dist.is_initialized()  # nothing of the engine is left in this process


def test_an_update_in_flight_and_failures_in_the_order_of_their_severity(parts, tiny_model, monkeypatch):
    async def all_of_them():
        await an_update_counts_tokens_that_nobody_was_told_of()
        await an_update_before_the_first_token()
        await a_load_that_fails_half_way()
        await a_load_of_the_reference_that_fails_half_way()
        await the_engine_dies()

    async def an_update_counts_tokens_that_nobody_was_told_of():
        from slipstream.vllm_compat.async_engine import tokens_so_far

        steady = parts.engine.engine_core._core.scheduler.schedule.__self__
        states = parts.engine.output_processor.request_states
        old, new = (engines.step(engines.policy(tiny_model), seed=seed, scale=0.05) for seed in (1, 2))
        for _ in range(5):  # on a busy machine some may have ended before the engine is paused: that shows nothing
            await parts.push(1, old)
            running = asyncio.create_task(parts.generate(LONG, *(prompt(p, n=4, seed=3) for p in PROMPTS)))
            async with asyncio.timeout(60):
                while ((batch := steady.batch) is None or batch.count.sum() < 80) and not running.done():
                    await asyncio.sleep(0)
            await parts.engine.pause_generation(mode="keep")
            unfinished = await tokens_so_far(parts.engine)
            if len(unfinished) == 8:
                break
            await parts.engine.resume_generation()
            await running
        counts = set(unfinished.values())
        assert min(counts) > max(state.detokenizer.num_output_tokens() for state in states.values())
        await parts.push(2, new)
        for ids, group in zip(PROMPTS, await running, strict=True):
            for completion in group:
                (_, before), (first, after) = completion.version_runs
                assert (before, after, first in counts) == (1, 2, True)
                wrong = [
                    (engines.logprobs(model, ids, completion.ids) - torch.tensor(completion.logprobs)).abs()
                    for model in (old, new)
                ]
                assert max(wrong[0][:first].max(), wrong[1][first:].max()) < 1e-4
                assert min(wrong[0][first:].max(), wrong[1][:first].max()) > 1e-2

    async def an_update_before_the_first_token():
        """Its weights sample all tokens, so that no run tells of another trainer's."""
        model = engines.step(engines.policy(tiny_model), seed=1)
        await parts.push(3, model)
        await parts.engine.pause_generation(mode="keep")
        calls = [
            parts.generate(LONG, prompt(p, n=2), update=u) for p, u in zip(PROMPTS, (None, "an update"), strict=True)
        ]
        running = [asyncio.create_task(call) for call in calls]
        async with asyncio.timeout(60):
            while sum(job.output is not None for job in parts.generation._jobs.values()) < 4:
                await asyncio.sleep(0.005)
        await parts.push(4, model)
        [[first, second]] = await running[0]
        assert {first.weight_version, second.weight_version} == {4}
        assert not first.version_runs
        with pytest.raises(wire.StreamError, match="other weights of version 4 serve than those that are") as refused:
            await running[1]
        assert refused.value.status == 409

    async def failing_push(model, reference=False):
        from slipstream.serving.replica_weights import Refused
        from slipstream.vllm_compat import model as engine_model

        load_weights = engine_model.load_weights

        def half(worker, tensors):
            load_weights(worker, tensors)
            raise RuntimeError("the device is gone")

        with monkeypatch.context() as patch:
            patch.setattr(engine_model, "load_weights", half)
            with pytest.raises(
                Refused, match="loading had begun when the weight update failed: the device is gone"
            ) as e:
                await parts.push(1, model, reference)
        assert e.value.status == 500

    async def a_load_that_fails_half_way():
        model = engines.step(engines.policy(tiny_model), seed=1)
        running = asyncio.create_task(parts.generate(LONG, prompt(PROMPTS[0], n=64)))
        await parts.sampling()
        await failing_push(model)
        with pytest.raises(wire.StreamError, match="ended a completion of prompt 0 by 'abort'") as lost:
            await running
        assert lost.value.status == 503
        assert parts.weights.version is None
        assert "a whole update repairs it" in parts.weights.stale
        assert not await parts.engine.is_paused()
        await parts.push(2, model)
        assert (parts.weights.version, parts.weights.stale) == (2, "")
        greedy = wire.SamplingMessage(max_tokens=16, temperature=0)
        [[completion]] = await parts.generate(greedy, prompt(PROMPTS[0]))
        assert completion.ids == engines.greedy(model, PROMPTS[0], 16, (1,))
        assert completion.weight_version == 2

    async def a_load_of_the_reference_that_fails_half_way():
        from slipstream.serving.replica_weights import Refused

        policy, reference = (engines.step(engines.policy(tiny_model), seed=seed, scale=0.1) for seed in (2, 3))
        await parts.push(3, policy)
        await parts.push(0, reference, reference=True)
        running = asyncio.create_task(parts.generate(LONG, prompt(PROMPTS[0], n=64, mixture=0.5)))
        await parts.sampling()
        await failing_push(reference, reference=True)
        with pytest.raises(wire.StreamError, match="ended a completion of prompt 0 by 'abort'"):
            await running
        with pytest.raises(Refused, match=r"mixture=0\.5: the last update of the reference failed .* a whole one") as e:
            await parts.generate(LONG, prompt(PROMPTS[0], mixture=0.5))
        assert e.value.status == 409
        assert parts.weights.version == 3
        running = asyncio.create_task(parts.generate(LONG, prompt(PROMPTS[0], seed=1)))
        await parts.sampling()
        await failing_push(reference, reference=True)
        [[completion]] = await running  # the policy alone goes on
        errors = engines.logprobs(policy, PROMPTS[0], completion.ids) - torch.tensor(completion.logprobs)
        assert (len(completion.ids), errors.abs().max() < 1e-4) == (200, True)
        await parts.push(0, reference, reference=True)
        [[completion]] = await parts.generate(LONG, prompt(PROMPTS[0], mixture=0.5))
        assert engines.mixture_errors([policy, reference], PROMPTS[0], completion, 0.5).max() < 1e-4

    async def the_engine_dies():
        from vllm.v1.engine.exceptions import EngineDeadError

        core = parts.engine.engine_core._core
        waiting = [asyncio.create_task(parts.generate(LONG, prompt(p, n=64))) for p in PROMPTS]
        await parts.sampling()
        paused = asyncio.create_task(parts.engine.pause_generation(mode="wait"))

        def step():
            raise MemoryError("no memory for a step")

        monkeypatch.setattr(core, "step_fn", step)
        async with asyncio.timeout(60):
            for task in waiting:
                with pytest.raises(wire.StreamError, match="the engine failed: EngineDeadError"):
                    await task
            for call in (
                paused,
                parts.engine.collective_rpc("slipstream", args=("device",)),
                parts.engine.pause_generation(),
            ):
                with pytest.raises(EngineDeadError):
                    await call
            with pytest.raises(EngineDeadError):
                await parts.generate(LONG, prompt(PROMPTS[0]))
        assert parts.engine.errored

    asyncio.run(all_of_them())


class Slow:
    """An engine whose workers wait for tensors, or whose requests do not end. It does not need vLLM's."""

    def __init__(self, arrived):
        self.arrived, self.resumed = arrived, 0
        self.renderer = self.engine_core = self

    async def collective_rpc(self, method, args):
        return [("ok", self.arrived if args[0] == "arrived" else None)]

    async def clear_mm_cache_async(self):
        pass

    async def pause_scheduler_async(self, mode, clear_cache):
        await asyncio.Event().wait()

    async def resume_generation(self):
        self.resumed += 1


@pytest.mark.parametrize(
    ("arrived", "reason"), [(False, "the tensors have not all arrived"), (True, "running requests have not ended")]
)
def test_a_commit_gives_up_before_nobody_waits_for_its_answer(arrived, reason):
    """Who waits kills the replica then, and could not say what it had waited for."""
    from slipstream.serving.replica_weights import Refused, Weights

    async def run():
        engine = Slow(arrived)
        weights = Weights(engine, None, False)
        begin = wire.BeginMessage(version=1, tensors=[], mode="wait")
        await weights.begin(wire.ReplicaBegin(transaction=1, update="an update", begin=begin))
        with pytest.raises(Refused, match=rf"{reason} within 0\.8 s, of 1 s .*--update-timeout") as refused:
            await asyncio.wait_for(weights.commit(wire.ReplicaCommit(transaction=1, checksums=[], timeout=1.0)), 60)
        assert refused.value.status == 409
        assert (weights.version, engine.resumed) == (0, int(arrived))

    asyncio.run(run())


def test_a_worker_that_refuses_leaves_no_other_receiving():
    from slipstream.serving.replica_weights import Refused, Weights

    verbs = []

    class Divided:
        async def collective_rpc(self, method, args):
            verbs.append(args[0])
            return [("ok", None), ("refused", "it does not fit") if args[0] == "begin" else ("ok", None)]

    async def run():
        weights = Weights(Divided(), None, False)
        begin = wire.BeginMessage(version=1, tensors=[], transport="group")
        with pytest.raises(Refused, match="it does not fit"):
            await weights.begin(wire.ReplicaBegin(transaction=1, update="an update", begin=begin))
        assert verbs == ["begin", "abort"]

    asyncio.run(run())


def test_a_bucket_that_arrived_changed_names_its_tensors_on_any_device(monkeypatch):
    """The group has cut them, be its backend that of the worker's device or not."""
    from slipstream.serving.worker import Receiver

    monkeypatch.setattr(process_group, "BUCKET_BYTES", {"nccl": 4096, "gloo": 256})
    specs = [wire.TensorSpec(name, "float32", (64,)) for name in ("first", "second", "third")]
    came = process_group.Received([(spec.name, torch.zeros(64)) for spec in specs], [1, 2, 3], finite=True)
    monkeypatch.setattr(process_group, "receive", lambda *arguments: came)
    receiver = Receiver(SimpleNamespace(device=torch.device("cuda")))
    receiver._specs, receiver._group = specs, Future()
    receiver._plans["policy"] = SimpleNamespace(unbounded=frozenset)
    receiver._group.set_result(process_group.Group("gloo", 1, 2, torch.device("cpu"), 1.0, None, None))
    receiver._receive()
    receiver._arriving.result(60)
    assert receiver.arrived([1, 2, 3])
    with pytest.raises(WeightUpdateError, match=r"differs from what was sent \(checksum\): second$"):
        receiver.arrived([1, 9, 3])


def test_a_vllm_with_other_openai_classes_serves_all_but_these(monkeypatch):
    from slipstream.vllm_compat import openai

    monkeypatch.setitem(sys.modules, "vllm.entrypoints.openai.completion.serving", None)
    app = openai.app(None)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://replica") as client:
            return [await client.post("/v1/completions", json={}), await client.get("/v1/models")]

    for answer in asyncio.run(ask()):
        assert answer.status_code == 501
        assert "has other classes for the OpenAI routes than are known: " in answer.json()["detail"]


def test_an_engine_that_cannot_start_says_why(tiny_model):
    with pytest.raises(ValueError, match=r"(?s)max_model_len"):
        replica.start_engine({"model": str(tiny_model), "dtype": "float32", "max_model_len": 100_000})
    with pytest.raises(ValueError, match=r"engine options: there is no option 'max_model_length'\. Did you mean"):
        replica.start_engine({"model": str(tiny_model), "max_model_length": 100})
    with pytest.raises(ValueError, match="the server's own class takes this place"):
        replica.start_engine({"model": str(tiny_model), "worker_extension_cls": "builtins.object"})
