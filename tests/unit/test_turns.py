"""Calls of different mixtures take turns: in order, without waiting for nothing, and however one of them ends."""

from __future__ import annotations

import asyncio

import pytest

from slipstream.serving import wire
from slipstream.serving.turns import Turns, mixture_of_call


class Engine:
    """Notes what happens to it: a number is a change to this mixture, a letter a call that has come in."""

    def __init__(self, mixture=None):
        self.events = []
        self.ends = {}
        self.broken = False
        self.turns = Turns(self._change, mixture)

    async def _change(self, mixture):
        if self.broken:
            raise RuntimeError("the engine is gone")
        self.events.append(mixture)
        await asyncio.sleep(0)

    def call(self, name, mixture):
        """A call that is in until `end(name)`."""
        return asyncio.create_task(self._call(name, mixture))

    async def _call(self, name, mixture):
        turn = await self.turns.enter(mixture)
        with turn:
            self.events.append(name)
            await self.ends.setdefault(name, asyncio.Event()).wait()
        turn.close()

    def end(self, *names):
        for name in names:
            self.ends.setdefault(name, asyncio.Event()).set()

    async def settled(self):
        """What has happened since the last look, once nothing happens any more."""
        for _ in range(20):
            await asyncio.sleep(0)
        events, self.events = self.events, []
        return events


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_they_come_in_order_and_share_a_turn():
    async def scenario():
        engine = Engine()
        calls = [engine.call(name, mixture) for name, mixture in (("a", 0.0), ("b", 0.0), ("c", 0.5), ("d", 0.0))]
        assert await engine.settled() == [0.0, "a", "b"]
        calls += [engine.call("e", 0.0), engine.call("f", 0.5)]
        engine.end("a")
        assert await engine.settled() == []
        engine.end("b")
        assert await engine.settled() == [0.5, "c"]
        engine.end("c")
        assert await engine.settled() == [0.0, "d", "e"]
        calls.append(engine.call("g", 0.5))
        engine.end("d", "e")
        assert await engine.settled() == [0.5, "f", "g"]
        engine.end("f", "g")
        await asyncio.gather(*calls)

    run(scenario)


def test_the_known_mixture_needs_no_change():
    async def scenario():
        engine = Engine(mixture=0.0)
        engine.end("a", "b")
        await asyncio.gather(engine.call("a", 0.0), engine.call("b", 0.0))
        assert await engine.settled() == ["a", "b"]

    run(scenario)


def test_who_leaves_the_queue_holds_up_nobody():
    async def scenario():
        engine = Engine()
        calls = [engine.call(name, mixture) for name, mixture in (("a", 0.0), ("b", 1.0), ("c", 0.0))]
        assert await engine.settled() == [0.0, "a"]
        calls[1].cancel()
        assert await engine.settled() == ["c"]
        assert calls[1].cancelled()
        engine.end("a", "c")
        await asyncio.gather(calls[0], calls[2])

    run(scenario)


def test_a_change_that_fails_is_tried_again():
    async def scenario():
        engine = Engine(mixture=0.0)
        engine.broken = True
        with pytest.raises(RuntimeError, match="the engine is gone"):
            await engine.call("a", 1.0)
        with pytest.raises(RuntimeError, match="the engine is gone"):
            await engine.call("b", 0.0)  # nobody knows whether it was changed
        engine.broken = False
        engine.end("c")
        await engine.call("c", 0.0)
        assert await engine.settled() == [0.0, "c"]

    run(scenario)


@pytest.mark.parametrize(
    ("mixtures", "has_reference", "reason"),
    [
        ([0.0, 0.5], True, r"mixtures 0\.0, 0\.5; .* make a call for each"),
        ([0.0, 0.5], False, r"mixtures 0\.0, 0\.5; .* make a call for each"),
        ([1.5], True, r"mixture=1\.5 is not allowed: a number from 0"),
        ([float("nan")], True, "mixture=nan is not allowed"),
        ([0.5], False, r"mixture=0\.5 .* this server has no reference model: start it with --reference"),
    ],
)
def test_what_a_call_cannot_ask_for(mixtures, has_reference, reason):
    message = wire.GenerateMessage(prompts=[wire.PromptMessage(ids=[5], mixture=m) for m in mixtures])
    with pytest.raises(ValueError, match=reason):
        mixture_of_call(message, has_reference)


def test_what_a_call_can_ask_for():
    assert mixture_of_call(wire.GenerateMessage(prompts=[]), False) == 0.0
    prompts = [wire.PromptMessage(ids=[5], mixture=0.3)] * 2
    assert mixture_of_call(wire.GenerateMessage(prompts=prompts), True) == 0.3
