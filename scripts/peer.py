"""Make .venv-peer, where TRL and the project can be imported into one process: `make peer`.

For benchmarks/parity alone; the package never needs TRL.
"""

from __future__ import annotations

import subprocess
import sys

import setup

# The steps are those of `make setup`, on another folder and another lock.
setup.VENV = setup.ROOT / ".venv-peer"
setup.PYTHON = setup.VENV / "bin" / "python"
setup.LOCK = setup.ROOT / "requirements" / "peer.lock"

CHECK = "import torch, slipstream, trl; trl.GRPOTrainer; print(f'torch {torch.__version__}, trl {trl.__version__}')"


def main() -> None:
    if sys.version_info < setup.OLDEST:
        sys.exit("this is Python {}.{}: make peer PYTHON=python3.11".format(*sys.version_info[:2]))
    setup.make_environment()
    setup.install_torch()
    setup.say("installing the locked packages (some 200 MB to download)")
    setup.pip("install", "--no-deps", "--no-compile", "-r", str(setup.LOCK))
    setup.pip("install", "--no-deps", "--no-build-isolation", "-e", str(setup.ROOT))
    setup.compile_packages()
    if subprocess.call([str(setup.PYTHON), "-c", CHECK]) != 0:
        sys.exit("the packages are installed, but they cannot be imported: see above")


if __name__ == "__main__":
    main()
