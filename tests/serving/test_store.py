"""The rendezvous store: served for real, called by the torch.distributed.Store that process groups are given."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import httpx
import pytest
from serving.stores import KEY, store_server

from slipstream.serving.store import ROUTE, StoreMessage
from slipstream.serving.wire import MSGPACK, encode
from slipstream.weights.transports.http_store import HttpStore


@pytest.fixture(scope="module")
def served():
    with store_server() as pair:
        yield pair


@pytest.fixture
def make(served, request):
    """Makes stores that share the test's own prefix."""
    made = []

    def make(timeout: float = 5.0, key: str = KEY, prefix: str = f"{request.node.name}/") -> HttpStore:
        made.append(HttpStore(served[0], key, prefix, timeout))
        return made[-1]

    yield make
    for store in made:
        store.close()


def test_values_counters_and_comparisons(make):
    store = make()
    store.set("a", b"\x00\xff")
    store.set("b", "text")
    assert (store.get("a"), store.get("b")) == (b"\x00\xff", b"text")
    assert store.check(["a", "b"])
    assert not store.check(["a", "c"])
    assert store.missing(["a", "c"]) == ["c"]
    assert [store.add("n", 3), store.add("n", -1)] == [3, 2]
    assert store.compare_set("x", "", "first") == b"first"
    assert store.compare_set("x", "other", "second") == b"first"
    assert store.compare_set("x", "first", "second") == b"second"
    assert store.compare_set("absent", "expected", "value") == b"expected"
    assert not store.check(["absent"])
    assert store.delete_key("x")
    assert not store.delete_key("x")


def test_a_waiting_call_returns_when_the_last_key_comes(make):
    setter, waiter = make(), make(timeout=30)
    setter.set("first", "1")
    got = []
    thread = threading.Thread(target=lambda: (waiter.wait(["first", "last"]), got.append(waiter.get("last"))))
    thread.start()
    setter.set("unrelated", "0")
    setter.set("last", "2")
    thread.join(60)
    assert got == [b"2"]


def test_a_wait_ends_at_its_deadline_and_names_the_keys(make):
    store = make(timeout=0.2)
    store.set("here", "1")
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^gone, lost did not come to the store within 0\.2 s"):
        store.wait(["here", "gone", "lost"])
    with pytest.raises(TimeoutError, match=r"gone did not come to the store within 0\.3 s"):
        store.wait(["gone"], timedelta(seconds=0.3))
    with pytest.raises(TimeoutError, match="gone did not come"):
        store.get("gone")
    assert 0.7 <= time.monotonic() - begin < 30


def test_groups_do_not_meet_and_are_dropped(make, served):
    ours, theirs = make(prefix="ours/"), make(prefix="theirs/")
    ours.set("k", "1")
    assert not theirs.check(["k"])
    theirs.set("k", "2")
    served[1].drop("ours/")
    assert not ours.check(["k"])
    assert theirs.get("k") == b"2"


def test_it_does_not_grow_for_ever(make, monkeypatch):
    monkeypatch.setattr("slipstream.serving.store.MOST_BYTES", 100)
    store = make(prefix="large/")
    store.set("k", b"x" * 60)
    with pytest.raises(ConnectionError, match=r"400: .*no more than 100 bytes"):
        store.set("l", b"x" * 60)
    store.delete_key("k")
    store.set("l", b"x" * 60)


def test_a_wrong_key_is_refused(make):
    with pytest.raises(ConnectionError, match="answered 401"):
        make(key="another").set("k", "1")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xc1", "StoreMessage"),
        (encode(StoreMessage(call="set", keys=[])), "length >= 1"),
        (encode(StoreMessage(call="wait", keys=["k"], timeout=1e9)), "timeout"),
        (encode(StoreMessage(call="set", keys=["k" * 1000])), "length <= 512"),
        (encode(StoreMessage(call="steal", keys=["k"])), "steal"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_body_is_a_400_with_a_reason(served, body, reason):
    headers = {"authorization": f"Bearer {KEY}", "content-type": MSGPACK}
    answer = httpx.post(served[0] + ROUTE, content=body, headers=headers, timeout=60)
    assert answer.status_code == 400
    assert reason in answer.json()["detail"]


def test_a_counter_that_holds_text_is_refused(make):
    store = make()
    store.set("k", "text")
    with pytest.raises(ConnectionError, match=r"400: .*is not a number"):
        store.add("k", 1)
