"""Make .venv and install the locked CPU environment and the project into it: `make setup`.

Runs under any Python 3.6 or later, with nothing but the standard library, so that an old one gets a clear message.
The environment variable TORCH_INDEX_URL replaces PyTorch's CPU wheel index.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "requirements" / "cpu.lock"
TORCH_INDEX_URL = os.environ.get("TORCH_INDEX_URL", "https://download.pytorch.org/whl/cpu")
# PyPI's are CUDA builds; beside CPU torch they cannot be imported, and then neither can transformers.
TORCH_EXTENSIONS = ("torchvision", "torchaudio", "torchcodec")
OLDEST = (3, 11)


def main():
    start = time.time()
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        sys.exit("The locked CPU environment is for Linux on x86-64. Elsewhere: pip install -e '.[dev]'")
    find_python()
    make_environment()
    install_torch()
    say("installing the locked packages (514 MB to download)")
    pip("install", "--no-deps", "--no-compile", "-r", str(LOCK))
    say("installing slipstream (editable)")
    pip("install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    remove_broken_extensions()
    compile_packages()
    say("checking that transformers and vllm can be imported")
    check = "import torch, transformers, vllm; print(f'torch {torch.__version__}, vllm {vllm.__version__}')"
    if subprocess.call([str(PYTHON), "-c", check], env=dict(os.environ, VLLM_LOGGING_LEVEL="ERROR")) != 0:
        sys.exit("the packages are installed, but they cannot be imported: see above")
    say(f"done in {time.time() - start:.0f} s")


def find_python():
    """Go on with a Python that is new enough: this one, or else a newer one on the PATH."""
    if sys.version_info >= OLDEST:
        return
    for minor in (13, 12, 11, 14):
        other = shutil.which(f"python3.{minor}")
        if other and subprocess.call([other, "-c", ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0:
            say("{} is Python {}.{}, using {}".format(sys.executable, *sys.version_info[:2], other))
            os.execv(other, [other, __file__])
    sys.exit(
        f"slipstream needs Python {OLDEST[0]}.{OLDEST[1]} or later, and {sys.executable} is {sys.version.split()[0]}. "
        "Install one and name it: make setup PYTHON=python3.11"
    )


def make_environment():
    """Make .venv unless there is one that works and is new enough."""
    check = f"import sys, pip; sys.exit(sys.version_info < {OLDEST})"
    if PYTHON.exists() and subprocess.call([str(PYTHON), "-c", check], stderr=subprocess.DEVNULL) == 0:
        return
    say("making {} with Python {}.{}.{}".format(VENV.name, *sys.version_info[:3]))
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)])
    if made.returncode:
        sys.exit(
            "{} -m venv failed. On Debian and Ubuntu the module is a package of its own: "
            "apt-get install python{}.{}-venv".format(sys.executable, *sys.version_info[:2])
        )


def install_torch():
    """Install the CPU build by its own version, which on most machines only PyTorch's index has."""
    torch = next(line.split()[0] for line in LOCK.read_text().splitlines() if line.startswith("torch=="))
    say(f"installing {torch} (192 MB to download)")
    if pip("install", "--no-deps", "--no-compile", torch, required=False) == 0:
        return
    say(f"pip's indexes do not have it, using {TORCH_INDEX_URL}")
    pip("install", "--no-deps", "--no-compile", "--index-url", TORCH_INDEX_URL, torch)


def remove_broken_extensions():
    """Uninstall torch's extension packages that are there but were built for another torch."""
    for name in TORCH_EXTENSIONS:
        there = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{name}') is None)"
        if subprocess.call([str(PYTHON), "-c", there]) != 0:
            continue
        if subprocess.call([str(PYTHON), "-c", "import " + name], stderr=subprocess.DEVNULL) != 0:
            say(f"removing {name}, which cannot be imported")
            pip("uninstall", "--yes", name)


def compile_packages():
    """Compile to bytecode on all cores: pip does it on one, and left to the first import it is slower still."""
    say("compiling")
    packages = subprocess.check_output([str(PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    # Its status is of no interest: some packages ship templates that are no valid Python.
    subprocess.call([str(PYTHON), "-m", "compileall", "-qq", "-j", "0", packages.decode().strip()])


def pip(command, *arguments, required=True):
    """Run pip in .venv without input and return its exit status; what is required ends the set-up if it fails."""
    line = [str(PYTHON), "-m", "pip", command, "-qq", "--disable-pip-version-check", *arguments]
    errors = None if required else subprocess.DEVNULL
    status = subprocess.call(line, stdin=subprocess.DEVNULL, stderr=errors, cwd=str(ROOT))
    if status and required:
        sys.exit("failed ({}): {}".format(status, " ".join(line)))
    return status


def say(text):
    print("[setup] " + text, flush=True)


if __name__ == "__main__":
    main()
