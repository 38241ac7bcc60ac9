"""Where the tensors of an update lie."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.serving.wire import TensorSpec
from slipstream.weights.layout import ALIGNMENT, bytes_of, layout

specs = st.lists(
    st.builds(
        TensorSpec,
        st.text(max_size=4),
        st.sampled_from(["float32", "bfloat16", "float16"]),
        st.lists(st.integers(0, 40), max_size=3).map(tuple),
    ),
    max_size=12,
)


@given(specs)
def test_tensors_lie_in_order_aligned_and_apart(specs: list[TensorSpec]) -> None:
    offsets, total = layout(specs)
    assert len(offsets) == len(specs)
    assert all(offset % ALIGNMENT == 0 for offset in (*offsets, total))
    ends = [offset + bytes_of(spec) for offset, spec in zip(offsets, specs, strict=True)]
    assert all(end <= begin for end, begin in zip(ends, [*offsets, total][1:], strict=True))
    # No more is added than alignment needs: the last bucket of a transport is never empty.
    assert total < sum(map(bytes_of, specs)) + ALIGNMENT * max(1, len(specs))


def test_bytes_of_a_tensor() -> None:
    assert bytes_of(TensorSpec("w", "bfloat16", (3, 5))) == 30
    assert bytes_of(TensorSpec("w", "float32", ())) == 4
    assert bytes_of(TensorSpec("w", "float16", (4, 0, 2))) == 0
    assert layout([TensorSpec("a", "float32", (17,)), TensorSpec("b", "float32", (1,))]) == ([0, 128], 192)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorSpec("w", "int64", (2,)), "w: dtype 'int64' cannot be sent; it must be one of float32"),
        (TensorSpec("w", "float32", (2, -1)), "negative dimension"),
    ],
)
def test_what_cannot_be_sent_is_named(spec: TensorSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout([spec])


def test_the_server_process_needs_no_torch_for_it() -> None:
    code = "import slipstream.weights.layout, slipstream.serving.store, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
