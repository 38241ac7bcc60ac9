"""Which sequences are read for together."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.vllm_compat import steady_model, steady_runner
from slipstream.vllm_compat.steady_prefixes import LEAST, Prefixes


def found(*blocks, size=64):
    prefixes = Prefixes.of([list(one) for one in blocks], size)
    return list(zip(prefixes.group.tolist(), prefixes.tokens.tolist(), strict=True))


def test_completions_of_a_prompt_are_a_group():
    a, b, c = range(10), range(100, 104), range(200, 210)
    assert found(a, a, a, b, b, c) == [(0, 640)] * 3 + [(3, 256)] * 2 + [(5, 0)]
    assert found(a) == [(0, 0)]
    assert found() == []
    assert found([], [], []) == [(0, 0), (1, 0), (2, 0)]


def test_a_beginning_that_all_prompts_share_does_not_take_the_place_of_the_prompts():
    """8 x 640 tokens are worth more than 16 x 192."""
    common = [1, 2, 3]
    a, b = [*common, *range(10, 17)], [*common, *range(20, 27)]
    assert found(*[a] * 8, *[b] * 8) == [(0, 640)] * 8 + [(8, 640)] * 8
    # Where each prompt has one completion, the beginning is all there is.
    assert found(a, b, [*common, 30], common) == [(0, 192)] * 4


def test_one_completion_that_is_left_of_a_prompt_does_not_shorten_what_others_share():
    """A batch that is formed again begins with the last completions of old prompts."""
    common = [1, 2, 3]
    a, b, c = ([*common, *range(10 * i, 10 * i + 7)] for i in (1, 2, 3))
    assert found(a, *[b] * 8, *[c] * 8) == [(0, 0)] + [(1, 640)] * 8 + [(9, 640)] * 8
    assert found(*[a] * 8, b, *[c] * 8) == [(0, 640)] * 8 + [(8, 0)] + [(9, 640)] * 8
    assert found(a, b, *[c] * 8) == [(0, 192)] * 2 + [(2, 640)] * 8


def parts(count):
    """All ways to divide neighbours."""
    if not count:
        yield []
    for first in range(1, count + 1):
        for others in parts(count - first):
            yield [first, *others]


@given(st.lists(st.lists(st.integers(1, 2), max_size=3), max_size=8))
def test_no_other_groups_save_more(choices):
    # Blocks 1 to 3 of all; then one of two at each of some levels, below those before.
    sequences = [[1, 2, 3] * bool(way) + [hash(tuple(way[:i])) for i in range(1, len(way) + 1)] for way in choices]

    def saves(sizes):
        total = place = 0
        for size in sizes:
            members = sequences[place : place + size]
            alike = sum(len(set(column)) == 1 for column in zip(*members, strict=False))
            total += (size - 1) * (alike if alike * 64 >= LEAST else 0)
            place += size
        return total * 64

    assert Prefixes.of(sequences, 64).read(100)[1] == max(map(saves, parts(len(sequences))))


def test_a_shorter_neighbour_shortens_a_group_only_where_more_is_saved():
    long, short = list(range(10)), [*range(9), 99]
    assert found(long, long, long, short, short) == [(0, 576)] * 5  # 4 x 9 blocks instead of 2 x 10 and 10
    assert found(long, long, [*range(4), 99]) == [(0, 640)] * 2 + [(2, 0)]  # 2 x 4 are less than 10


def test_what_two_have_in_common_is_worth_it_from_some_length_on():
    blocks = list(range(LEAST // 64))
    assert found(blocks, blocks) == [(0, LEAST)] * 2
    assert found(blocks[:-1], blocks[:-1]) == [(0, 0), (1, 0)]


def test_groups_stay_when_sequences_leave():
    a, b = range(10), range(100, 110)
    prefixes = Prefixes.of([list(a)] * 4 + [list(b)] * 3, 64).part(np.array([1, 3, 4, 5]))
    groups, saved = prefixes.read(8)
    assert groups.tolist() == [[2, 0, 2, 0], [640] * 4]
    assert saved == 2 * 640
    groups, saved = prefixes.part(np.array([0, 2, 3])).read(8)
    assert groups.tolist() == [[1, 2, 0], [0, 640, 640]]  # nobody is read for but itself: no prefix
    assert saved == 640


def test_more_than_a_program_takes_are_read_for_in_parts():
    groups, saved = Prefixes.of([list(range(10))] * 12 + [[77]], 64).read(5)
    assert groups.tolist() == [[5, 0, 0, 0, 0, 5, 0, 0, 0, 0, 2, 0, 1], [640] * 12 + [0]]
    assert saved == (4 + 4 + 1) * 640
    assert groups.dtype == np.int32


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 12), st.integers(1, 20)), min_size=1, max_size=12),
    st.integers(1, 7),
)
def test_whoever_is_read_for_together_begins_alike(kinds, most):
    sequences = [
        [1000 * (kind if place > 2 else 0) + place for place in range(length)]
        for kind, length, count in kinds
        for _ in range(count)
    ]
    groups, saved = Prefixes.of(sequences, 64).read(most)
    place = read = 0
    while place < len(sequences):
        members, common = int(groups[0, place]), int(groups[1, place])
        assert 1 <= members <= most
        assert not groups[0, place + 1 : place + members].any()
        assert (groups[1, place : place + members] == common).all()
        assert common % 64 == 0
        assert common == 0 or (common >= LEAST and members > 1)
        for one in sequences[place : place + members]:
            assert one[: common // 64] == sequences[place][: common // 64]
            assert len(one) >= common // 64
        read += common
        place += members
    assert place == len(sequences)
    assert saved == groups[1].sum() - read


@pytest.mark.parametrize(
    ("longest", "chunk", "chunks"), [(512, 256, 3), (3840, 256, 16), (3841, 512, 9), (32768, 4096, 9)]
)
def test_sequences_of_any_length_have_few_chunks(longest, chunk, chunks):
    assert steady_model.chunks_of(longest) == (chunk, chunks)
    assert chunks * chunk >= longest + chunk - 1 or chunks - 1 >= longest / chunk


def test_sizes_of_graphs_are_spread():
    sizes = [512, 496, *range(480, 0, -16), 8, 4, 2, 1]
    assert steady_model._spread(sizes) == [512, 400, 320, 256, 192, 144, 112, 80, 64, 48, 32, 16, 8]
    assert steady_model._spread([4, 2, 1]) == [4]


def test_graphs_are_recorded_before_the_first_completions(monkeypatch):
    """Recording them later can make a thread fail that computes rewards."""
    monkeypatch.setattr(steady_runner, "gpu", lambda *names: lambda array, out: None)
    own = []

    def before(padded):
        own.append(padded)
        return SimpleNamespace(replay=list)

    monkeypatch.setattr(steady_runner, "Graphs", lambda runner: SimpleNamespace(before=before))
    manager = SimpleNamespace(run_fullgraph=lambda description: None)
    steady = steady_runner.SteadyRunner(
        SimpleNamespace(req_states=None, cudagraph_manager=manager, execute_model=None, sample_tokens=None), None
    )
    steady.shared = Shared()
    cached = SimpleNamespace(req_ids=["a", "b", "c"], num_computed_tokens=[200, 200, 3000])
    step = SimpleNamespace(
        scheduled_cached_reqs=cached, slipstream_prefixes=Prefixes.of([[1, 2], [1, 2], list(range(9, 50))], 64)
    )
    steady._groups(step)
    assert steady._run(step, SimpleNamespace(num_tokens=8)) == 8  # 128 of 3400 tokens are not worth it
    assert steady.shared.asked == [3]
    own.clear()
    cached.num_computed_tokens = [200, 200, 150]
    steady._groups(step)
    assert steady._run(step, SimpleNamespace(num_tokens=8)) == 4
    assert own == [8]  # those that the last sequences will need
    monkeypatch.setattr(steady.shared, "pays", lambda saved: False)
    assert steady._run(step, SimpleNamespace(num_tokens=8)) == 8
    assert steady.shared.asked == [3, 3]


def test_few_tokens_are_not_worth_it():
    model = object.__new__(steady_model.SharedModel)
    model.bytes = 1024
    assert not model.pays(19_531)
    assert model.pays(19_532)


def test_recording_that_was_broken_off_begins_again():
    model = object.__new__(steady_model.SharedModel)
    model.sizes, model._graphs, model._work = [16, 8], {}, lambda padded: padded
    made = iter([("sixteen", None), KeyboardInterrupt(), ("sixteen again", None), ("eight", None)])

    def record(warm, work):
        graph = next(made)
        if isinstance(graph, BaseException):
            raise graph
        return graph

    model.graphs = SimpleNamespace(record=record)
    with pytest.raises(KeyboardInterrupt):
        model.graph(7)
    assert model.graph(7) == (8, "eight")
    assert model.graph(9) == (16, "sixteen again")


def test_layers_keep_their_attention_where_an_interrupt_comes():
    class Refusing:
        def __setattr__(self, name, value):
            raise KeyboardInterrupt

    model, impl = object.__new__(steady_model.SharedModel), SimpleNamespace()
    model.layers = {"first": SimpleNamespace(impl=impl), "second": SimpleNamespace(impl=Refusing())}
    with pytest.raises(KeyboardInterrupt), model._instead():
        pass
    assert not hasattr(impl, "forward")


def test_a_gpu_without_memory_left_makes_steps_as_before(monkeypatch):
    def full(graphs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(steady_runner, "Graphs", lambda runner: SimpleNamespace(sizes=[8]))
    monkeypatch.setattr(steady_runner, "obstacle", lambda *args: None)
    monkeypatch.setattr(steady_runner, "SharedModel", full)
    steady = steady_runner.SteadyRunner(
        SimpleNamespace(cudagraph_manager=None, req_states=None, execute_model=None, sample_tokens=None), None
    )
    assert "memory" in steady.share()
    assert steady.shared is None


class Shared:
    """Graphs that tell what they were asked for."""

    most = 8
    groups = SimpleNamespace(shape=(2, 6))

    def __init__(self):
        self.asked = []

    def pays(self, saved):
        return saved >= 128

    def graph(self, count):
        self.asked.append(count)
        return None if count > 4 else (4, SimpleNamespace(replay=lambda: None))


def test_prompts_are_read_once_where_that_saves_enough(monkeypatch):
    copied = []
    monkeypatch.setattr(steady_runner, "gpu", lambda *names: lambda array, out: copied.append(array.tolist()))
    runner = SimpleNamespace(
        max_num_reqs=100, device="cpu", block_tables=None, req_states=None, sampler=None, execute_model=None,
        sample_tokens=None, cudagraph_manager=SimpleNamespace(graphs={}, run_fullgraph=lambda description: None),
    )  # fmt: skip
    monkeypatch.setattr(steady_runner, "Graphs", lambda runner: SimpleNamespace(before=lambda padded: Replayed()))
    steady = steady_runner.SteadyRunner(runner, None)
    steady.shared = Shared()

    class Replayed:
        def replay(self):
            pass

    def step(names, tokens, prefixes):
        cached = SimpleNamespace(req_ids=names, num_computed_tokens=tokens)
        return SimpleNamespace(
            scheduled_cached_reqs=cached, **({} if prefixes is None else {"slipstream_prefixes": prefixes})
        )

    vllms = SimpleNamespace(num_tokens=8)
    both = Prefixes.of([list(range(10))] * 2, 64)  # 640 of 2 * 700 tokens, until there are 3200
    first = step(["a", "b"], [700, 700], both)
    steady._groups(first)
    assert copied == [[[2, 0, 0, 0, 0, 0], [640, 640, 0, 0, 0, 0]]]
    assert [steady._run(first, vllms) for _ in range(899)] == [4] * 899
    assert steady._run(first, vllms) == 8
    steady._groups(step(["b"], [1200], both.part(np.array([1]))))
    assert len(copied) == 1
    assert steady._run(step(["b"], [1200], None), vllms) == 8
    assert len(steady.shared.asked) == 900  # nobody shares anything
    steady._groups(first)
    steady._groups(step(["c", "d"], [700, 700], None))  # of a batch that tells nothing
    assert steady._run(first, vllms) == 8
    assert steady.steps_shared == 899
    many = Prefixes.of([list(range(10))] * 5, 64)
    steady._groups(step(list("abcde"), [700] * 5, many))
    assert steady._run(step(list("abcde"), [700] * 5, many), vllms) == 8  # no graph is large enough


def test_another_gpu_than_was_measured_has_to_be_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(steady_model, "_layers", lambda runner: 1 / 0)
    runner = SimpleNamespace(device="cuda")
    assert steady_model.obstacle(runner, [8]) == "reading it once was not measured on NVIDIA A100"
    with pytest.raises(ZeroDivisionError):  # what else there is, is looked at
        steady_model.obstacle(runner, [8], anywhere=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ZeroDivisionError):
        steady_model.obstacle(runner, [8])
