"""How processes with gloo's threads end."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "faults" / "end_with_gloo.py"


def end(way: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(folder / "rendezvous"), way]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("way", ["leave", "end"])
def test_a_thread_of_gloo_that_frees_a_tensor_does_not_abort_the_process_at_its_end(way, tmp_path):
    done = end(way, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_waiting_it_does(tmp_path):
    """Where this fails, torch waits itself, and lifetime.end_after_gloo can go."""
    ends = []
    for attempt in ("first", "second", "third"):  # on a busy machine the process may be gone before its thread runs
        (tmp_path / attempt).mkdir()
        ends.append(end("alone", tmp_path / attempt))
        if ends[-1].returncode:
            break
    assert ends[-1].returncode == -signal.SIGABRT
    assert "terminate called without an active exception" in ends[-1].stderr
