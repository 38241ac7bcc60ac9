"""What an engine changes in the process is in force while it works, and gone when it does not."""

from __future__ import annotations

import os
import random

import numpy
import pytest
import torch

from slipstream.generation.guest import Guest


def draw():
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def test_two_random_streams_that_do_not_meet():
    guest = Guest()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    host = [draw() for _ in range(4)]
    random.seed(2), numpy.random.seed(2), torch.manual_seed(2)
    engine = [draw() for _ in range(4)]
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    drawn = {"host": [], "engine": []}
    for turn in range(4):
        drawn["host"].append(draw())
        with guest.inside():
            if turn == 0:
                random.seed(2), numpy.random.seed(2), torch.manual_seed(2)
            with guest.inside():  # a call within a call
                drawn["engine"].append(draw())
    assert drawn == {"host": host, "engine": engine}


def test_environment_and_settings_come_back_after_an_error(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    guest, threads, setter = Guest(), torch.get_num_threads(), torch.set_num_threads
    precision = torch.get_float32_matmul_precision()
    pin = torch.Tensor.pin_memory

    def disturb():
        os.environ.update(LOCAL_WORLD_SIZE="1", LD_PRELOAD="x.so", VLLM_DIST_IDENT="abc")
        torch.set_num_threads(threads + 1)
        torch.set_float32_matmul_precision("medium")
        torch.set_num_threads = lambda count: None
        torch.Tensor.pin_memory = lambda self: self
        raise OSError("engine")

    with pytest.raises(OSError, match="engine"), guest.inside():
        disturb()
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"
    assert "LD_PRELOAD" not in os.environ
    assert os.environ.pop("VLLM_DIST_IDENT") == "abc"  # vLLM reads it again
    assert (torch.get_num_threads(), torch.set_num_threads) == (threads, setter)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.Tensor.pin_memory is pin
    with guest.inside():
        assert (os.environ["LOCAL_WORLD_SIZE"], os.environ["LD_PRELOAD"]) == ("1", "x.so")
        assert torch.get_num_threads() == threads + 1
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.set_num_threads is not setter
    assert (torch.get_num_threads(), torch.set_num_threads) == (threads, setter)
