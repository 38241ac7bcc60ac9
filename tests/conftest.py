"""Shared fixtures. Thread settings come before torch is imported: an engine and a trainer share two cores here."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny random chat model with a tied LM head."""
    return tiny.build(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_model_untied(tmp_path_factory):
    """The same with an LM head of its own."""
    return tiny.build(tmp_path_factory.mktemp("models") / "tiny-untied", tied=False)
