"""Losses and gradients are TRL's, where its environment is there to compare with."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-peer" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(not PEER.exists(), reason="there is no .venv-peer: make peer")
@pytest.mark.parametrize(("trainer", "cases"), [("grpo", 200), ("rloo", 40), ("online_dpo", 14)])
def test_losses_and_gradients_are_trls(trainer, cases, tmp_path):
    results, page = tmp_path / f"parity_{trainer}.json", tmp_path / "parity.md"
    done = subprocess.run(
        [PEER, ROOT / "benchmarks" / "parity" / f"{trainer}.py", "--json", results, "--page", page],
        capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tables = json.loads(results.read_text())
    compared = [
        cell["error"]
        for table in ("losses", "advantages")
        for row in tables.get(table, {}).values()
        for cell in row.values()
        if cell["status"] == "same"
    ]
    assert len(compared) >= cases
    assert max(compared) <= tables["tolerance"] == 1e-5
    assert "# The same numbers as TRL" in page.read_text()
