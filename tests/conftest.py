"""Shared fixtures. Thread settings come before torch is imported: several processes share two cores here."""

from __future__ import annotations

import os
import random
import zlib

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import calling
import numpy
import pytest
import tiny
import tiny_vision
import torch
from hypothesis import settings

from slipstream.generation import guest

# An example may take as long as a busy machine makes it take. Two runs of the tests try the same examples, so that what
# fails was changed and not drawn; --hypothesis-profile=explore draws others.
settings.register_profile("explore", deadline=None)
settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.load_profile("same")


def pytest_collectstart(collector):
    _seed(collector.nodeid)


@pytest.fixture(scope="module", autouse=True)
def seeded_module(request):
    """Random numbers of a module's fixtures are its own, whatever ran before it in this process."""
    _seed(request.node.nodeid)


@pytest.fixture(autouse=True)
def seeded_test(request):
    """Random numbers of a test are its own."""
    _seed(request.node.nodeid)


def _seed(name):
    seed = zlib.crc32(name.encode())
    random.seed(seed), numpy.random.seed(seed), torch.manual_seed(seed)


@pytest.fixture(scope="module", autouse=True)
def process_as_it_was():
    """A module whose engine stays a part of the process fails here, not what runs after it elsewhere."""
    before = _settings()
    yield
    now = _settings()
    changed = [f"{name} was {before[name]} and is {now[name]}" for name in before if now[name] != before[name]]
    assert not changed, f"left in this process: {'; '.join(changed)}. Start an engine inside a Guest"


def _settings():
    """What torch does in this process, by name."""
    found = {
        f"{owner.__name__}.{name}": getattr(owner, name)
        for owner, name in guest._attributes_an_engine_may_replace()
        if name != "set_stream"  # vLLM wraps it when it is imported
    }
    return found | {"threads": torch.get_num_threads(), "precision": torch.get_float32_matmul_precision()}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny random chat model with a tied LM head."""
    return tiny.build(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_model_untied(tmp_path_factory):
    """The same with an LM head of its own."""
    return tiny.build(tmp_path_factory.mktemp("models") / "tiny-untied", tied=False)


@pytest.fixture(scope="session")
def calling_model(tmp_path_factory):
    """Folder of a tiny chat model that calls tools; see `calling`."""
    return calling.build(tmp_path_factory.mktemp("models") / "calling")


@pytest.fixture(scope="session")
def tiny_vision_model(tmp_path_factory):
    """Folder of a tiny random vision-language model."""
    return tiny_vision.build_idefics3(tmp_path_factory.mktemp("models") / "tiny-vision")
