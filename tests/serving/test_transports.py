"""Weights through shared memory and through process groups of real processes: every byte arrives, or an error comes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving.stores import KEY, store_server

from slipstream.serving.wire import TensorSpec
from slipstream.weights.buckets import Inspection, Packer, names_in, specs_of, views
from slipstream.weights.layout import layout, unsendable
from slipstream.weights.plan import make_plan
from slipstream.weights.transports import group, shared_memory
from slipstream.weights.verify import Expectation, checksum

NONCE, OFFSET = bytes(range(32)), 64
BUCKET = 1024  # in these tests
DTYPES = ("float32", "bfloat16", "float16")


def example(seed: int = 0, sizes: tuple[int, ...] = ()) -> list[tuple[str, torch.Tensor]]:
    """Tensors of all kinds: matrices, vectors, a scalar, an empty one, strided ones; then vectors of `sizes`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 33), (64,), (), (0, 5), (3, 4, 5), *((size,) for size in sizes)]
    tensors = [(f"t{i}", torch.randn(shape, generator=generator)) for i, shape in enumerate(shapes)]
    return [*tensors, ("strided", torch.randn(16, 24, generator=generator).t())]


def specs(tensors, dtype: str) -> list[TensorSpec]:
    """What is announced for them in one type, or in all of them by turns (`mixed`)."""
    dtypes = itertools.cycle(DTYPES if dtype == "mixed" else [dtype])
    return [TensorSpec(name, next(dtypes), tuple(tensor.shape)) for name, tensor in tensors]


def assert_arrived(got, tensors, announced, sums) -> None:
    """What arrived is what was sent, cast; its checksums are the sender's."""
    assert [name for name, _ in got] == [name for name, _ in tensors]
    for (name, value), (_, sent), spec in zip(got, tensors, announced, strict=True):
        assert value.dtype == getattr(torch, spec.dtype), name
        assert torch.equal(value, sent.to(value.dtype)), name
    assert [int(checksum(value)) for _, value in got] == sums


# Shared memory -------------------------------------------------------------------------------------------------------


@pytest.fixture
def shared_file(tmp_path):
    """Makes a server's file for `specs`; it is in /dev/shm, as a server's is."""
    paths = []

    def make(announced, nonce: bytes = NONCE) -> str:
        path = f"/dev/shm/slipstream-test-{os.getpid()}-{len(paths)}"
        paths.append(path)
        with open(path, "wb") as file:
            file.write(nonce)
            file.truncate(OFFSET + layout(announced)[1])
        return path

    yield make
    for path in paths:
        if os.path.exists(path):
            os.unlink(path)


@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"])
def test_shared_memory_carries_every_type_and_shape(shared_file, dtype):
    tensors = example()
    announced = specs(tensors, dtype)
    path = shared_file(announced)
    with shared_memory.Writer(path, NONCE, OFFSET, announced) as writer:
        sums = writer.write(tensors)
    assert_arrived(shared_memory.read(path, OFFSET, announced), tensors, announced, sums)


def test_the_next_writer_uses_the_same_mapping(shared_file):
    first, second = example(1), example(2)
    announced = specs(first, "float32")
    path = shared_file(announced)
    with shared_memory.Writer(path, NONCE, OFFSET, announced) as writer:
        writer.write(first)
    with open(path, "r+b") as file:  # a server gives each update a nonce of its own
        file.write(bytes(reversed(NONCE)))
    mapped = writer.mapped
    with shared_memory.Writer(path, bytes(reversed(NONCE)), OFFSET, announced, mapped) as writer:
        sums = writer.write(second)
    assert writer.mapped is mapped
    assert_arrived(shared_memory.read(path, OFFSET, announced), second, announced, sums)
    os.rename(shared_file(announced), path)  # a file of the same name is another file
    with shared_memory.Writer(path, NONCE, OFFSET, announced, mapped) as writer:
        assert writer.mapped is not mapped


def test_a_reader_cannot_change_the_file(shared_file):
    tensors = example()
    announced = specs(tensors, "float32")
    path = shared_file(announced)
    with shared_memory.Writer(path, NONCE, OFFSET, announced) as writer:
        sums = writer.write(tensors)
    for _, tensor in shared_memory.read(path, OFFSET, announced):
        tensor.zero_()
    assert_arrived(shared_memory.read(path, OFFSET, announced), tensors, announced, sums)


def test_another_file_is_not_written_to(shared_file, tmp_path):
    tensors = example()
    announced = specs(tensors, "float32")
    path = shared_file(announced, nonce=bytes(32))
    with pytest.raises(shared_memory.NotSharedError, match="first bytes are not the server's nonce"):
        shared_memory.Writer(path, NONCE, OFFSET, announced)
    with pytest.raises(shared_memory.NotSharedError, match="cannot be opened here"):
        shared_memory.Writer("/dev/shm/slipstream-is-not-here", NONCE, OFFSET, announced)
    with pytest.raises(shared_memory.NotSharedError, match=r"has \d+ bytes; the weights need \d+"):
        shared_memory.Writer(path, bytes(32), OFFSET, [*announced, TensorSpec("more", "float32", (1000,))])
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        shared_memory.Writer(str(link), bytes(32), OFFSET, announced)


def test_tensors_that_were_not_announced_are_an_error(shared_file):
    tensors = example()
    announced = specs(tensors, "float32")
    writer = shared_memory.Writer(shared_file(announced), NONCE, OFFSET, announced)
    with pytest.raises(ValueError, match=r"tensor 1 is 't2' of shape \(\), but 't1' of shape \(64,\) was announced"):
        writer.write([tensors[0], tensors[2]])
    with pytest.raises(ValueError, match="2 tensors came of the 6 that were announced; 't2' is next"):
        writer.write(tensors[:2])
    with pytest.raises(ValueError, match="'t0' comes after the last of the 6"):
        writer.write([*tensors, tensors[0]])


def test_reading_checks_size_and_alignment(shared_file):
    announced = specs(example(), "float32")
    path = shared_file(announced)
    with pytest.raises(ValueError, match="its tensors need"):
        shared_memory.read(path, OFFSET, [*announced, TensorSpec("more", "float32", (1000,))])
    with pytest.raises(ValueError, match="multiple of 64"):
        shared_memory.read(path, 32, announced)


# Buckets -------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 12), max_size=3).map(tuple)),
        max_size=8,
    ),
    st.integers(1, 6),
)
def test_buckets_put_together_are_the_layout(kinds, lines):
    announced = [TensorSpec(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(kinds)]
    tensors = [(spec.name, torch.randn(spec.shape)) for spec in announced]
    total, size = layout(announced)[1], 64 * lines
    packer = Packer(announced, tensors, size, lambda index: torch.empty(size, dtype=torch.uint8))
    buckets = list(packer)
    assert [len(b) for b in buckets] == [min(size, total - begin) for begin in range(0, total, size)]
    memory = torch.cat(buckets) if buckets else torch.empty(0, dtype=torch.uint8)
    assert_arrived(views(memory, announced), tensors, announced, packer.totals())


def test_wide_types_are_cast_to_the_engines_and_narrow_ones_are_not():
    tensors = [(dtype, torch.zeros(2, dtype=getattr(torch, dtype))) for dtype in DTYPES]
    tensors[0] = ("float32", torch.empty(2**22 + 1, device="meta"))
    assert [s.dtype for s in specs_of(tensors, "bfloat16")] == ["bfloat16", "bfloat16", "float16"]
    assert [s.dtype for s in specs_of(tensors, "float32")] == ["float32", "bfloat16", "float16"]
    assert unsendable(specs_of(tensors, "float32")) == ""


def test_small_float32_stays_what_it_is_as_long_as_it_adds_little():
    def announced(*sizes):
        return [spec.dtype for spec in specs_of([("t", torch.empty(s, device="meta")) for s in sizes], "float16")]

    assert announced(2**22, 2**22 + 1) == ["float32", "float16"]
    assert announced(3 * 2**20, 2**20, 1, 2**20) == ["float16", "float32", "float32", "float32"]
    # Routers of a large mixture: 2**27 values of 2**32.
    assert announced(*[2**21] * 64, *[2**25] * 128) == ["float32"] * 64 + ["float16"] * 128


HELD = {"A_log": torch.float32, "router": torch.float32, "norm": torch.bfloat16, "embed": torch.bfloat16}
MANY = {"A_log": (32,), "router": (4, 96), "norm": (48,), "embed": (64, 48)}


def carry(transport, announced, tensors, shared_file, members):
    """What arrives of `tensors`, through a file, HTTP bodies (by their buckets) or a process group."""
    if transport == "shared_memory":
        path = shared_file(announced)
        with shared_memory.Writer(path, NONCE, OFFSET, announced) as writer:
            sums = writer.write(tensors)
        return shared_memory.read(path, OFFSET, announced), sums
    if transport == "body":
        packer = Packer(announced, tensors, BUCKET, lambda index: torch.empty(BUCKET, dtype=torch.uint8))
        memory = torch.cat(list(packer))
        return views(memory, announced), packer.totals()
    joined, queue, _ = members(1, announced)
    sums = group.send(joined, announced, iter(tensors))
    got, there = queue.get(timeout=60)
    assert there == sums
    arrived = [(s.name, torch.frombuffer(bytearray(data), dtype=getattr(torch, s.dtype)).view(s.shape))
               for s, data in zip(announced, got, strict=True)]  # fmt: skip
    return arrived, [int(checksum(value)) for _, value in arrived]


@pytest.mark.parametrize("transport", ["shared_memory", "body", "group"])
def test_what_an_engine_of_16_bits_holds_in_float32_is_what_was_sent(transport, shared_file, members):
    """As vLLM holds the decays of state space models, and routers. An engine in the same process is as exact."""
    engine = {name: torch.full(MANY[name], -7.0, dtype=dtype) for name, dtype in HELD.items()}

    def load(into):
        return lambda tensors: [into[name].copy_(tensor) for name, tensor in tensors]

    blank = {name: torch.empty_like(parameter, device="meta") for name, parameter in engine.items()}
    sent = [(name, torch.randn(shape)) for name, shape in MANY.items()]
    announced = specs_of(sent, "bfloat16")
    got, sums = carry(transport, announced, sent, shared_file, members)
    assert_arrived(got, sent, announced, sums)
    expectation = Expectation(make_plan(blank, load(blank), got), got, engine, [])
    load(engine)(got)
    expectation.check(engine)
    for name, tensor in sent:
        assert torch.equal(engine[name], tensor.to(HELD[name])), name


def test_types_that_cannot_be_sent_are_all_named():
    tensors = [(f"t{i}", torch.zeros(2, dtype=dtype)) for i, dtype in enumerate((torch.int64, torch.bool, torch.half))]
    tensors += [(f"wide{i}", torch.zeros(2, dtype=torch.float64)) for i in range(8)]
    told = unsendable(specs_of(tensors, "bfloat16"))
    assert told.startswith(
        "of a type that cannot be sent (it must be one of float32, bfloat16, float16): t0 (int64), t1"
    )
    assert told.endswith("wide5 (float64) and 2 more")


# Process groups ------------------------------------------------------------------------------------------------------

# Vectors that end before, at and behind a bucket's edge, and one that spans several.
EXCHANGED = ("mixed", *DTYPES)
EXCHANGES = [(), (240,), (241,), (256, 256), (1, 255), (2000, 3), (272,)]


def worker(rank: int, size: int, url: str, behaviour: str | list[TensorSpec], results, going_on) -> None:
    """A server's worker, in a process of its own: receives all exchanges, or one of these specs, or fails in a way."""
    group.BUCKET_BYTES["gloo"] = BUCKET
    results.put("started")
    joined = group.join("gloo", group.HttpStore(url, KEY, "g/", 60), rank, size, 120, "cpu")
    if behaviour == "dies":
        os._exit(9)
    if not isinstance(behaviour, str):
        got = group.receive(joined, behaviour, "cpu")
        results.put(([value.view(torch.uint8).numpy().tobytes() for _, value in got.tensors], got.checksums))
        group.leave(joined)
        return
    if behaviour == "leaves":
        results.put(leave_while_receiving(joined, going_on))
        return
    try:
        for index, sizes in enumerate(EXCHANGES):
            announced = specs(example(index, sizes), EXCHANGED[index % 4])
            if behaviour == "idles":
                going_on.wait(120)
            got = group.receive(joined, announced, "cpu")
            finite = all(bool(tensor.isfinite().all()) for _, tensor in got.tensors)
            assert finite or not got.finite
            results.put(([int(checksum(tensor)) for _, tensor in got.tensors], got.checksums))
        assert not torch.distributed.is_initialized()
    except group.GroupError as error:
        results.put(str(error))
    group.leave(joined)


def leave_while_receiving(joined: group.Group, may_leave) -> tuple[str, float]:
    """What the receiving came to, and the seconds until both were over."""
    announced = specs(example(0), "float32")
    begun = joined.process_group._get_sequence_number_for_group() + -(-layout(announced)[1] // BUCKET)
    with ThreadPoolExecutor() as pool:
        receiving = pool.submit(group.receive, joined, announced, "cpu")
        while joined.process_group._get_sequence_number_for_group() < begun:
            time.sleep(0.01)
        assert may_leave.wait(120)
        time.sleep(0.2)  # for gloo's threads to take what came, and to wait for what did not
        begin = time.monotonic()
        group.leave(joined)
        reason = str(receiving.exception())
    return reason, time.monotonic() - begin


@pytest.fixture
def members(monkeypatch):
    """Starts workers and joins them as rank 0: (group, queue of results, event that idle and leaving ones wait for)."""
    monkeypatch.setitem(group.BUCKET_BYTES, "gloo", BUCKET)
    context, processes, groups = multiprocessing.get_context("spawn"), [], []

    def start(count: int, behaviour: str = "receives"):
        queue, event = context.Queue(), context.Event()
        for rank in range(1, count + 1):
            arguments = (rank, count + 1, url, behaviour, queue, event)
            processes.append(context.Process(target=worker, args=arguments, daemon=True))
            processes[-1].start()
        assert [queue.get(timeout=120) for _ in range(count)] == ["started"] * count
        store = group.HttpStore(url, KEY, "g/", 60)
        groups.append(group.join("gloo", store, 0, count + 1, 120, "cpu"))
        return groups[-1], queue, event

    with store_server() as (url, _):
        yield start
        for joined in groups:
            group.leave(joined)
        for process in processes:
            process.join(60)
            alive = process.is_alive()
            process.kill()
            assert not alive


def test_a_bucket_names_the_tensors_that_reach_into_it():
    announced = [TensorSpec("small", "float32", (3,)), TensorSpec("large", "bfloat16", (150,)),
                 TensorSpec("empty", "float32", (0,)), TensorSpec("last", "float32", (16,))]  # fmt: skip
    offsets, total = layout(announced)
    assert (offsets, total) == ([0, 64, 384, 384], 448)
    assert [names_in(announced, 128, i) for i in range(4)] == [["small", "large"], ["large"], ["large"], ["last"]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_show_in_any_bucket(dtype, value):
    announced = [TensorSpec("a", str(dtype).removeprefix("torch."), (96,))]
    for spoiled in (None, 0, 2):
        looked = Inspection(announced)
        for index in range(3):
            bucket = torch.randn(32).to(dtype)
            if index == spoiled:
                bucket[-1] = value
            looked.look_at(bucket.view(torch.uint8))
        sums, finite = looked.found()
        assert (len(sums), finite) == (3, spoiled is None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_show_among_tensors_of_several_types(value):
    tensors = example(3, (400,))
    announced = specs(tensors, "mixed")
    for spoiled, spec in [(None, None), *enumerate(announced)]:
        sent = [(name, tensor.clone(memory_format=torch.contiguous_format)) for name, tensor in tensors]
        if spec is not None and sent[spoiled][1].numel():
            sent[spoiled][1].view(-1)[-1] = value
        looked = Inspection(announced)
        # What lies between the tensors are no numbers.
        for bucket in Packer(announced, sent, 192, lambda index: torch.full((192,), 255, dtype=torch.uint8)):
            looked.look_at(bucket)
        assert looked.found()[1] == (spec is None or not sent[spoiled][1].numel())


@pytest.mark.parametrize("count", [1, 2])
def test_groups_carry_tensors_around_bucket_edges(members, count):
    joined, queue, _ = members(count)
    for index, sizes in enumerate(EXCHANGES):
        tensors = example(index, sizes)
        announced = specs(tensors, EXCHANGED[index % 4])
        sums = group.send(joined, announced, iter(tensors))
        cast = [t.to(getattr(torch, s.dtype)) for (_, t), s in zip(tensors, announced, strict=True)]
        expected = [int(checksum(t)) for t in cast]
        assert [queue.get(timeout=60) for _ in range(count)] == [(expected, sums)] * count
        assert len(sums) == -(-layout(announced)[1] // BUCKET)
    assert not torch.distributed.is_initialized()


def test_members_listen_where_they_reach_each_other_alone(members):
    """Left to itself, gloo takes the address of the host's name, which others may reach."""

    def listening():
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        connections = [c for process in processes for c in process.net_connections("tcp")]
        return {tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN}

    before = listening()  # the store, and what other tests have started
    members(1)
    ours = listening() - before
    assert len(ours) == 2
    assert {address for address, _ in ours} == {"127.0.0.1"}


def test_a_worker_that_dies_is_an_error_at_once(members):
    joined, *_ = members(1, "dies")
    tensors = example(0, (8_000_000,))  # more than the operating system buffers
    begin = time.monotonic()
    with pytest.raises(group.GroupError, match="rank 0 of 2 waited for the server's workers"):
        group.send(joined, specs(tensors, "float32"), tensors)
    assert time.monotonic() - begin < 60  # of 120


def test_a_worker_that_does_nothing_is_an_error_at_the_deadline(members):
    joined, queue, going_on = members(1, "idles")
    joined.timeout = 2  # from here on: to join may take longer
    joined.process_group._set_default_timeout(timedelta(seconds=joined.timeout))
    tensors = example(0, (8_000_000,))
    begin = time.monotonic()
    with pytest.raises(group.GroupError, match="did not do their part within 2 s"):
        group.send(joined, specs(tensors, "float32"), tensors)
    assert 1.5 < time.monotonic() - begin < 60
    going_on.set()  # into a group that is broken
    assert "waited for the trainer" in queue.get(timeout=60)


def test_a_trainer_that_leaves_is_an_error_at_once(members):
    joined, queue, _ = members(1)
    group.send(joined, specs(example(0), "float32"), example(0))
    queue.get(timeout=60)
    group.leave(joined)
    assert "rank 1 of 2 waited for the trainer" in queue.get(timeout=60)  # of 120


@pytest.mark.parametrize(("count", "sent"), [(1, 0), (1, 1), (3, 1)])
def test_workers_leave_at_once_while_the_trainer_is_silent(members, count, sent):
    """The server may have to drop an update whose trainer is alive and stuck, before its first bucket or within."""
    joined, queue, may_leave = members(count, "leaves")
    works = [joined.process_group.broadcast(torch.zeros(BUCKET, dtype=torch.uint8), 0) for _ in range(sent)]
    for work in works:
        work.wait()
    may_leave.set()
    for _ in range(count):
        reason, seconds = queue.get(timeout=200)
        assert "waited for the trainer" in reason
        assert seconds < 20  # of 120
    begin = time.monotonic()
    tensors = example(0, (8_000_000,))
    with pytest.raises(group.GroupError, match="waited for the server's workers"):
        group.send(joined, specs(tensors, "float32"), tensors)
    assert time.monotonic() - begin < 20


def test_members_that_do_not_come_are_named():
    with store_server() as (url, _):

        def join(rank: int, name: str) -> str:
            with pytest.raises(group.GroupError) as caught:
                group.join("gloo", group.HttpStore(url, KEY, name, 1), rank, 4, 1, "cpu")
            return str(caught.value)

        for attempt in range(5):  # on a busy machine rank 2 may come too late as well
            with ThreadPoolExecutor() as pool:
                errors = list(pool.map(join, (0, 2), [f"g{attempt}/"] * 2))
            if "worker 1 (rank 2)" not in errors[0]:
                break
    assert errors[0].endswith("waited 1 s for worker 0 (rank 1), worker 2 (rank 3)")
    assert errors[1].startswith("rank 2 of 4 could not join the gloo group")


def test_a_worker_without_a_trainer_says_so():
    with store_server() as (url, _), pytest.raises(group.GroupError, match=r"waited .* for the trainer \(rank 0\)"):
        group.join("gloo", group.HttpStore(url, KEY, "g/", 0.5), 1, 2, 0.5, "cpu")


def test_backend_and_device_must_fit():
    with pytest.raises(ValueError, match="use nccl on cuda and gloo on cpu"):
        group.join("nccl", None, 0, 2, 1, "cpu")  # type: ignore[arg-type]
