"""Decode graphs, as far as no GPU is needed: which are recorded, which are taken, and whose turn it is."""

from __future__ import annotations

import contextlib
import enum
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from slipstream.vllm_compat import steady_graphs, steady_runner
from slipstream.vllm_compat.model import check_graphs
from slipstream.vllm_compat.steady_graphs import Graphs, Wanted

Mode = enum.Enum("Mode", "NONE PIECEWISE FULL")


class Graph(NamedTuple):
    """What vLLM calls the description of a graph."""

    num_tokens: int
    num_reqs: int | None
    uniform_token_count: int | None = 1
    cg_mode: Mode = Mode.FULL


@pytest.fixture
def runner(monkeypatch):
    """A model runner of vLLM's with room for 100 sequences."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    graphs = dict.fromkeys((Graph(104, 100, None), Graph(8, 8), Graph(96, 96), Graph(16, 16, None), Graph(1, 1)))
    return SimpleNamespace(
        max_num_reqs=100, device="cpu", block_tables=None, req_states=None, sampler=None,
        cudagraph_manager=SimpleNamespace(graphs=graphs),
        execute_model=lambda step: "vLLM executes", sample_tokens=lambda grammar: "vLLM samples",
    )  # fmt: skip


def test_all_sizes_are_recorded_at_once_and_the_largest_first(runner, monkeypatch):
    recorded = []

    def record(self, warm, work):
        recorded.append(work)
        return f"graph {len(recorded)}", None

    monkeypatch.setattr(Graphs, "record", record)
    monkeypatch.setattr(Graphs, "_prepare", lambda self, padded: padded)
    graphs = steady_graphs.Graphs(runner)
    assert graphs.before(8) == "graph 2"
    assert recorded == [96, 8, 1]  # the one for 104 tokens would be too large for 100 sequences
    assert graphs.before(1) == "graph 3"
    assert graphs.after(Wanted(8, scaled=False, logps=True, ranks=False)) == ("graph 5", None)
    assert graphs.after(Wanted(96, scaled=False, logps=True, ranks=False)) == ("graph 4", None)
    assert len(recorded) == 6
    graphs.after(Wanted(8, scaled=True, logps=True, ranks=False))
    assert len(recorded) == 9


def test_graphs_that_are_not_of_decode_steps_are_vllms_own_matter(runner):
    steady = steady_runner.SteadyRunner(runner, None)
    for found, taken in (
        (Graph(8, 8), True),
        (Graph(104, 100, None), False),  # of mixed steps: writes for 104 sequences would go past the buffers' ends
        (Graph(16, 16, None), False),
        (Graph(24, 24), False),  # not recorded
        (Graph(8, None, None, Mode.PIECEWISE), False),
        (Graph(97, 97, 1, Mode.NONE), False),
    ):
        runner.cudagraph_manager.dispatch = lambda *sizes, found=found: found
        assert steady._description(7) == (found if taken else None)


def test_a_step_that_was_broken_off_is_not_sampled_later(runner, monkeypatch):
    steady = steady_runner.SteadyRunner(runner, None)
    step = SimpleNamespace(slipstream_steady=True, scheduled_cached_reqs=SimpleNamespace(req_ids=["a"]))
    monkeypatch.setattr(steady, "_ready", lambda step: SimpleNamespace(num_tokens=1))
    monkeypatch.setattr(steady.graphs, "before", lambda padded: SimpleNamespace(replay=lambda: None))
    runner.cudagraph_manager.run_fullgraph = lambda description: None
    assert runner.execute_model(step) is None
    # What should have come now is `sample_tokens`. An interrupt came instead.
    assert runner.execute_model(SimpleNamespace()) == "vLLM executes"
    assert runner.sample_tokens(None) == "vLLM samples"


class Longest(NamedTuple):
    """The same in later vLLMs."""

    cg_mode: Mode = Mode.FULL
    uniform_token_count: int | None = None
    max_query_len: int | None = None


@pytest.mark.parametrize(
    ("graphs", "wrong"),
    [
        ([Graph(8, 8), Graph(8, 8, None)], True),
        ([Graph(8, 8), Graph(8, None, None, Mode.PIECEWISE)], False),
        ([Longest()], False),
        ([], False),
    ],
)
def test_graphs_of_whole_steps_that_would_be_wrong_are_refused(graphs, wrong):
    """vLLM 0.26 records them for runs of a few tokens and replays them with longer ones."""
    worker = SimpleNamespace(model_runner=SimpleNamespace(cudagraph_manager=SimpleNamespace(graphs=graphs)))
    told = pytest.raises(NotImplementedError, match="Use 'FULL_AND_PIECEWISE'") if wrong else contextlib.nullcontext()
    with told:
        check_graphs(worker)
    check_graphs(SimpleNamespace(model_runner=SimpleNamespace()))
