"""The frames that completions travel in, and the messages around them."""

from __future__ import annotations

import itertools
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.generation.engine import Sampling
from slipstream.records import Completion
from slipstream.serving import wire


def _answer() -> tuple[bytes, list[wire.CompletionFrame | wire.PromptFrame]]:
    frames: list[wire.CompletionFrame | wire.PromptFrame] = [
        wire.PromptFrame(0, [5, 6]),
        wire.CompletionFrame(0, 1, Completion([7, 8, 9], array("f", [-0.5, -1.5, -2.0]), 3, "stop")),
        wire.CompletionFrame(1, 0, Completion([1, 2], None, 3, "length", ((0, 3), (1, 4)))),
    ]
    data = (
        wire.prompt_frame(0, [5, 6])
        + wire.completion_frame(0, 1, [7, 8, 9], [-0.5, -1.5, -2.0], "stop", [(0, 3)])
        + wire.completion_frame(1, 0, np.array([1, 2]), None, "length", [(0, 3), (1, 4)])
        + wire.end_frame(3)
    )
    return data, frames


@given(st.lists(st.integers(0, 200), max_size=12))
def test_frames_survive_any_cut(cuts: list[int]) -> None:
    data, expected = _answer()
    edges = sorted({0, len(data), *(min(c, len(data)) for c in cuts)})
    reader, got = wire.FrameReader(), []
    for begin, end in itertools.pairwise(edges):
        got += reader.feed(data[begin:end])
    reader.finish()
    assert got == expected


def test_a_cut_off_answer_is_noticed() -> None:
    data, _ = _answer()
    reader = wire.FrameReader()
    assert len(list(reader.feed(data[:-1]))) == 3
    with pytest.raises(ValueError, match="cut off after 3 frames"):
        reader.finish()


def test_a_lost_frame_is_noticed() -> None:
    data, _ = _answer()
    first = len(wire.prompt_frame(0, [5, 6]))
    with pytest.raises(ValueError, match="has 2 frames and says that it had 3"):
        list(wire.FrameReader().feed(data[first:]))


def test_an_error_frame_is_raised_with_its_status() -> None:
    with pytest.raises(wire.StreamError, match="the engine died") as raised:
        list(wire.FrameReader().feed(wire.error_frame(503, "the engine died")))
    assert raised.value.status == 503


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_other_bytes_are_refused_or_waited_for(data: bytes) -> None:
    reader = wire.FrameReader()
    try:
        list(reader.feed(data))
    except (ValueError, wire.StreamError):
        return
    assert len(reader._rest) <= len(data)


def test_messages_are_the_same_in_msgpack_and_json() -> None:
    message = wire.decode(
        b'{"prompts": [{"ids": [1, 2], "n": 3, "seed": 7}], "sampling": {"max_tokens": 5}, "version": 2}',
        wire.GenerateMessage,
        "application/json; charset=utf-8",
    )
    assert wire.decode(wire.encode(message), wire.GenerateMessage) == message
    assert wire.sampling_of(message.sampling) == Sampling(max_tokens=5)
    assert wire.sampling_of(wire.sampling_message(Sampling(max_tokens=5, top_k=3))) == Sampling(max_tokens=5, top_k=3)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b'{"prompts": [], "verion": 2}', "unknown field `verion`"),
        (b'{"prompts": 3}', "Expected `array`, got `int` - at `$.prompts`"),
        (b"{", "GenerateMessage"),
        (b'{"prompts": [{"ids": [1.5]}]}', r"\$.prompts\[0\].ids"),
    ],
)
def test_a_wrong_body_is_refused_with_its_place(body: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint.replace("$.prompts`", r"\$.prompts`")):
        wire.decode(body, wire.GenerateMessage, wire.JSON)


def test_another_content_type_is_refused() -> None:
    with pytest.raises(ValueError, match="'application/x-python-pickle' is not supported"):
        wire.decode(b"", wire.GenerateMessage, "application/x-python-pickle")


def test_ids_travel_as_int32() -> None:
    assert wire.unpack_ids(wire.pack_ids([0, 1, 2**31 - 1])) == [0, 1, 2**31 - 1]
    with pytest.raises(ValueError, match="7 bytes is no multiple of 4"):
        wire.unpack_ids(b"1234567")
