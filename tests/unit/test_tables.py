"""The tables of measurements say what benchmarks/results does."""

from __future__ import annotations

import subprocess
import sys

import pytest
from test_trainer_docs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import tables

# The ends of rows, from the files by hand.
SHOWN = {
    "docs/performance.md": [
        "| **Slipstream**, with log-probabilities | 3.30 | 6.45 | 1.05 |", "| 62% | 38 |",
        "|  | **Slipstream**, Liger | 3.12 | 1.43 | 1.60 | 0.013 | 54 | 512 | 3.1 |",
        "| **Slipstream**, with log-probabilities | 0.78 | 3.03 | 1.02 |",
    ],
    "README.md": [
        "| vLLM, asked as TRL asks | 10.93 s | 3.30 s | **3.3** |", "| TRL 1.16 | 8.20 s | 3.12 s | **2.6** |",
    ],
}  # fmt: skip


@pytest.mark.parametrize("page", tables.PAGES)
def test_pages_are_up_to_date(page):
    text = (ROOT / page).read_text()
    assert tables.filled(text) == text, "run python benchmarks/tables.py"
    assert all(row in text for row in SHOWN[page])


def test_it_needs_nothing_but_python():
    code = "import sys; sys.path.insert(0, 'benchmarks'); import tables; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)
