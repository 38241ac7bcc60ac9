"""Which ways of dividing weights over ranks are refused, and that models which are not divided are read whole."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from slipstream.trainers import sharding


def config(**fields):
    return SimpleNamespace(**{"fsdp": None, "use_transformers_continuous_batching": False} | fields)


@pytest.mark.parametrize(
    ("environment", "fields", "told"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP version 1 .* in the accelerate config"),
        ({"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "1"}, {}, "set fsdp_version: 2"),
        ({}, {"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 1}}, "FSDP version 1 .* in fsdp_config"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"use_transformers_continuous_batching": True},
            "use_transformers_continuous_batching=True does not go with FSDP",
        ),
    ],
)  # fmt: skip
def test_what_does_not_work_is_refused(monkeypatch, environment, fields, told):
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NotImplementedError, match=told):
        sharding.check(config(**fields))


@pytest.mark.parametrize("fields", [{}, {"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 2}}])
def test_what_works_is_not(monkeypatch, fields):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    sharding.check(config(**fields))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    sharding.check(config(**{"use_transformers_continuous_batching": not fields} | fields))


@pytest.mark.parametrize("before", [None, "true"])
def test_models_that_are_not_divided_are_read_whole(monkeypatch, before):
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    monkeypatch.delenv(name, raising=False)
    if before:
        monkeypatch.setenv(name, before)
    with sharding.whole_models():
        assert os.environ[name] == "false"
    assert os.environ.get(name) == before
