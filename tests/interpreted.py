"""Kernels of Triton without a GPU: its interpreter is chosen when a process begins, so each test has its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import found_first

FOLDER = Path(__file__).parents[1] / ".triton"
"""Where `make test-kernels` puts Triton, which nothing else is to find."""


def needs_triton(test):
    """Mark a test that calls `check`."""
    there = find_spec("triton") is not None or (FOLDER / "triton").is_dir()
    return pytest.mark.kernel(pytest.mark.skipif(not there, reason="Triton is not there: make test-kernels")(test))


def check(script: str) -> None:
    """Run Python code that prints "all equal" when it is done."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": found_first(FOLDER)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert "all equal" in done.stdout, done.stderr[-3000:]
