"""A trainer of two ranks, of which one has trouble with the server: both know at once, none waits for the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RANKS = Path(__file__).with_name("ranks.py")


def test_ranks_fail_together_and_recover_together(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    try:
        first, second = (rank.communicate(timeout=240)[0].splitlines() for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    told = "rank 0 could not send the weights"
    assert first == [
        "full: ServerError: no memory",
        "bug: KeyError: 'tensor'",
        "lost: EngineLostError: the server is gone",
        "export: NotImplementedError: cannot be exported",
        "one is unlucky: answer 2",
        "and stays alone: ConnectionError: the engine did not come back for another rank; see its error",
    ]
    assert second == [
        f"full: RuntimeError: {told}: ServerError: no memory",
        f"bug: RuntimeError: {told}: KeyError: 'tensor'",
        f"lost: EngineLostError: {told}: EngineLostError: the server is gone",
        "export: NotImplementedError: cannot be exported",
        "one is unlucky: answer 2",
        "and stays alone: ConnectionError: there is no server",
    ]
