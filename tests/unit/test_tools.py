"""Tools: what the model is told about them, and what happens when it calls them."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading

import pytest
from calling import ADD, add
from signals import handled

from slipstream.rollouts.event_loop import EventLoop
from slipstream.rollouts.tools import Outcome, Toolbox


def fail(reason: str) -> str:
    """Fail.

    Args:
        reason: Why.
    """
    raise RuntimeError(reason)


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


class Counter:
    """An environment."""

    def __init__(self):
        self.count = 0

    def reset(self, **_):
        self.count = 0

    def increment(self, by: int) -> int:
        """Count on.

        Args:
            by: How far.
        """
        self.count += by
        return self.count

    def _hidden(self):
        raise AssertionError

    @property
    def broken(self):
        raise AssertionError("properties are not looked at")


def run(toolbox, *calls, environment=None):
    [outcomes] = toolbox.run([(toolbox.of(environment), calls)])
    return outcomes


def test_results_and_errors_are_told_in_the_order_of_the_calls():
    async def later(x: int) -> int:
        """Wait.

        Args:
            x: Anything.
        """
        await asyncio.sleep(0)
        return x

    outcomes = run(
        Toolbox([add, fail, later]),
        call("later", x=1), ADD, call("fail", reason="no"), call("nothing"), call("add", a=1), call("later", x=2),
    )  # fmt: skip
    assert [o.content for o in outcomes[:3]] == ["1", "3", "{'error': 'no'}"]
    assert "no tool is named 'nothing'; the tools are 'add', 'fail', 'later'" in outcomes[3].content
    assert "missing 1 required positional argument: 'b'" in outcomes[4].content
    assert outcomes[5] == Outcome("later", "2")
    assert [o.failed for o in outcomes] == [False, False, True, True, True, False]


def test_async_tools_of_all_rollouts_run_at_the_same_time():
    arrived = []

    async def meet(me: int) -> str:
        """Wait for all the others.

        Args:
            me: A number.
        """
        arrived.append(me)
        while len(arrived) < 4:
            await asyncio.sleep(0)
        return f"{me} met {len(arrived)}"

    toolbox = Toolbox([meet])
    tools = toolbox.of()
    found = toolbox.run([(tools, [call("meet", me=0), call("meet", me=1)]), (tools, [call("meet", me=2)] * 2)])
    assert [[o.content for o in row] for row in found] == [["0 met 4", "1 met 4"], ["2 met 4", "2 met 4"]]


def test_async_tools_have_one_event_loop_even_within_another():
    loops = []

    async def note() -> None:
        """Note the loop."""
        loops.append(asyncio.get_running_loop())

    toolbox = Toolbox([note])

    async def within():
        return run(toolbox, call("note"))

    run(toolbox, call("note"))
    assert asyncio.run(within()) == [Outcome("note", "None")]
    assert loops[0] is loops[1]


def test_the_first_failure_of_each_tool_is_logged(caplog):
    async def fail_later() -> None:
        """Fail."""
        raise ValueError("async")

    toolbox = Toolbox([fail, fail_later])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            run(toolbox, call("fail", reason="why"), call("fail_later"), call("a"), call("b"))
    assert [r.getMessage().split(" failed")[0] for r in caplog.records] == [
        "the call of the tool 'fail'", "the call of a tool that is not there", "the call of the tool 'fail_later'",
    ]  # fmt: skip
    assert "RuntimeError: why" in caplog.text
    assert "in fail\n" in caplog.text


def test_what_cannot_be_written_is_a_call_that_failed():
    class Silent:
        def __str__(self):
            raise ValueError("nothing to say")

    def plain():
        """Return it."""
        return Silent()

    async def later():
        """Return it."""
        return Silent()

    outcomes = run(Toolbox([plain, later, add]), call("plain"), call("later"), call("add", a=1, b=2))
    assert [outcome.failed for outcome in outcomes] == [True, True, False]
    assert "nothing to say" in outcomes[0].content


def test_what_is_under_way_when_a_tool_stops_the_run_is_cancelled():
    ended = []

    async def stop() -> None:
        """Stop."""
        raise KeyboardInterrupt

    async def go_on() -> None:
        """Go on."""
        try:
            await asyncio.sleep(60)
            ended.append("at last")
        finally:
            ended.append("cancelled")

    toolbox = Toolbox([go_on, stop])
    with pytest.raises(KeyboardInterrupt):
        run(toolbox, call("go_on"), call("stop"))
    assert ended == ["cancelled"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_what_is_no_error_goes_through(kind):
    def stop() -> None:
        """Stop."""
        raise kind

    async def stop_later() -> None:
        """Stop."""
        raise kind

    for function in (stop, stop_later):
        with pytest.raises(kind):
            run(Toolbox([function]), call(function.__name__))


@pytest.fixture
def ctrl_c():
    """Ctrl-C interrupts, as it does where nobody has started the tests in the background of a script."""
    with handled(signal.SIGINT, signal.default_int_handler):
        yield


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_does_not_wait_for_async_tools():
    ended = []

    async def forever():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    loop = EventLoop("test")
    threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        loop.run(forever())
    assert ended == [True]


def test_arguments_are_the_tools_own():
    def sort(numbers: list[int]) -> list[int]:
        """Sort.

        Args:
            numbers: What.
        """
        numbers.sort()
        return numbers

    asked = call("sort", numbers=[2, 1])
    assert run(Toolbox([sort]), asked) == [Outcome("sort", "[1, 2]")]
    assert asked == call("sort", numbers=[2, 1])


def test_what_no_tokenizer_can_read_is_replaced():
    def half() -> str:
        """Return half a pair."""
        return "a\ud800b"

    assert run(Toolbox([half]), call("half"))[0].content == "a?b"


def test_blocks_of_content_are_refused():
    def show() -> list:
        """Show something."""
        return [{"type": "image", "image": None}]

    with pytest.raises(NotImplementedError, match="'show' returned blocks of content"):
        run(Toolbox([show]), call("show"))


def test_methods_of_environments_are_tools_of_their_rollouts():
    toolbox = Toolbox([add], Counter)
    assert [schema["function"]["name"] for schema in toolbox.schemas] == ["add", "increment"]
    one, two = toolbox.environments([None] * 2)
    assert toolbox.environments([None] * 3)[:2] == [one, two]
    calls = [call("increment", by=2)]
    found = toolbox.run([(toolbox.of(one), calls), (toolbox.of(two), calls), (toolbox.of(one), [*calls, ADD])])
    assert [[o.content for o in row] for row in found] == [["2"], ["2"], ["4", "3"]]
    assert toolbox.rewards == []


class Scored(Counter):
    """Another one, with a reward of its own."""

    def get_reward(self):
        return self.count


def test_rows_choose_among_several_environments():
    toolbox = Toolbox([add], {"plain": Counter, "scored": Scored, "again": Scored})
    kinds = [toolbox.kind({"environment": name}) for name in ("scored", "plain", "scored", "again")]
    made = toolbox.environments(kinds)
    assert [type(one) for one in made] == [Scored, Counter, Scored, Scored]
    assert len({id(one) for one in made}) == 4
    assert toolbox.environments(kinds) == made
    run(toolbox, call("increment", by=3), environment=made[0])
    [reward] = toolbox.rewards
    assert reward(environments=made) == [3, None, 0, 0]
    assert reward.__name__ == "Scored"
    assert [s["function"]["name"] for s in toolbox.schemas_of({"environment": "plain"})] == ["add", "increment"]
    for row in ({}, {"environment": "other"}):
        with pytest.raises(ValueError, match="is not one of those in environment_factory: 'plain', 'scored', 'again'"):
            toolbox.schemas_of(row)


class NoReset:
    def increment(self) -> None:
        """Count on."""


class AsyncReset:
    async def reset(self):
        return None


def undocumented(x: int):
    return x


def unhinted(x):
    """Do.

    Args:
        x: Something.
    """


@pytest.mark.parametrize(
    ("tools", "factory", "kind", "reason"),
    [
        ([undocumented], None, ValueError, "how to call 'undocumented'"),
        ([unhinted], None, ValueError, "how to call 'unhinted'"),
        ([add, add], None, ValueError, "'add' is there twice"),
        (["add"], None, TypeError, "tools holds 'add'"),
        (add, None, TypeError, "is not a list of functions"),
        (None, "Counter", TypeError, "environment_factory='Counter' is not a function"),
        (None, NoReset, TypeError, "made a NoReset, which has no method reset"),
        (None, AsyncReset, TypeError, "AsyncReset.reset is async, and nothing awaits it"),
        (None, {"a": Counter, "b": 3}, TypeError, "environment_factory=3 is not a function"),
        ([add], {"a": Counter, "b": NoReset}, TypeError, "made a NoReset"),
        ([add], {}, ValueError, "environment_factory={} names no environment"),
    ],
)
def test_what_cannot_be_a_tool_is_refused(tools, factory, kind, reason):
    with pytest.raises(kind, match=reason):
        Toolbox(tools, factory)
