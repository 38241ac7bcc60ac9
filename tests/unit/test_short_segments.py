"""Short segments attended to side by side, against each of them on its own in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.modeling.attention import Layout, _short_together
from slipstream.modeling.short_segments import SHORT, batches_of
from slipstream.records import Segment


def alone(query, key, value, segments, window):
    """(1, H, T, D) to (1, T, H, D), by a mask over all pairs of the row."""
    position, root = [], []
    for i, segment in enumerate(segments):
        first = 0 if segment.parent is None else segments[segment.parent].length
        position += range(first, first + segment.length)
        root += [i] * segment.length
    seen = torch.zeros(len(position), len(position), dtype=torch.bool)
    for q, (p, i) in enumerate(zip(position, root, strict=True)):
        for k, (at, j) in enumerate(zip(position, root, strict=True)):
            family = j == i or j == segments[i].parent
            seen[q, k] = family and at <= p and (window is None or p - at < window)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


@st.composite
def rows(draw):
    segments: list[Segment] = []
    for _ in range(draw(st.integers(1, 6))):
        roots = [i for i, s in enumerate(segments) if s.parent is None]
        parent = draw(st.sampled_from([None, *roots]))
        segments.append(Segment(draw(st.integers(1, 9)), parent))
    return tuple(segments)


@settings(max_examples=60, deadline=None)
@given(segments=rows(), window=st.sampled_from([None, 1, 2, 5]))
def test_values_and_gradients_are_those_of_each_segment_alone(segments, window):
    torch.manual_seed(0)
    tokens = sum(s.length for s in segments)
    given_ = [torch.randn(1, heads, tokens, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    layout = Layout(segments, torch.device("cpu"))
    made = _short_together(*given_, layout, window, None, 0.0)
    expected = alone(*given_, segments, window)
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(made)
    gradients = torch.autograd.grad((made * weights).sum(), given_)
    for got, want in zip(gradients, torch.autograd.grad((expected * weights).sum(), given_), strict=True):
        # Gradients of shared keys are added up in float32.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_long_segments_stay_alone_and_padding_is_less_than_half_of_each_side():
    lengths = [3, 5, 6, 7, 200, 130, SHORT + 1, SHORT + 1]
    plan = batches_of([Segment(n) for n in lengths], None, torch.device("cpu"))
    assert plan.alone == (0, 6, 7)
    assert [tuple(b.queries_SQ.shape) for b in plan.batches] == [(3, 7), (2, 200)]
    assert len(set(plan.order_T.tolist())) == sum(lengths), "two tokens share a result"


@pytest.mark.parametrize("length", [1, SHORT])
def test_equal_segments_are_one_call(length):
    plan = batches_of([Segment(length)] * 4, None, torch.device("cpu"))
    assert len(plan.batches) == 1
    assert plan.alone == ()
