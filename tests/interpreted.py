"""Kernels of Triton without a GPU: its interpreter is chosen when a process begins, so each test has its own."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def check(script: str) -> None:
    """Run Python code that prints "all equal" when it is done."""
    command = ["env", "TRITON_INTERPRET=1", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "all equal" in done.stdout, done.stderr[-3000:]
