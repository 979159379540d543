"""Finds an installed PyTorch to compile the CPU kernel against, without importing it.

The kernel uses PyTorch's stable ABI: headers of any PyTorch from 2.10 on, installed for any Python,
give a library that works with all others. So the torch of the environment that vicinal is
installed into serves, and builds that are isolated from it need not download a second one.
"""

import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

OLDEST = (2, 10)
REQUIREMENT = "torch>=2.10"
_HEADER = "include/torch/csrc/stable/library.h"


def find_torch() -> Path | None:
    """The folder of an installed torch that has the headers, or None.

    The environment variable VICINAL_TORCH names it, if set. Else the search goes from the running
    Python to the environments that the shell's variables name.

    Raises:
        FileNotFoundError: VICINAL_TORCH is set to a folder without the headers.
    """
    named = os.environ.get("VICINAL_TORCH")
    if named:
        if not has_headers(Path(named)):
            raise FileNotFoundError(
                f"VICINAL_TORCH: expected the folder of a torch from 2.10 on, got {named!r}"
            )
        return Path(named)
    return next(filter(has_headers, _candidates()), None)


def has_headers(torch: Path) -> bool:
    """Whether the folder holds a torch that is recent enough, with its headers."""
    if not ((torch / _HEADER).is_file() and (torch / "version.py").is_file()):
        return False
    text = (torch / "version.py").read_text(encoding="utf-8")
    version = re.search(r"""__version__ = ['"](\d+)\.(\d+)""", text)
    return version is not None and (int(version[1]), int(version[2])) >= OLDEST


def _candidates() -> Iterator[Path]:
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    # pip hides the environment from builds but runs them by its Python.
    for folder in (sysconfig.get_path("platlib"), site.getusersitepackages()):
        yield Path(folder, "torch")
    for prefix in _prefixes():
        for packages in ("site-packages", "dist-packages"):
            for lib in ("lib", "lib64"):
                yield from sorted(prefix.glob(f"{lib}/python3*/{packages}/torch"))


def _prefixes() -> Iterator[Path]:
    """Environments. uv runs builds in one of its own but passes on the shell's variables."""
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX", "UV_PROJECT_ENVIRONMENT"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    for folder in {os.getcwd(): None, os.environ.get("PWD", "."): None}:
        for parent in (Path(folder), *Path(folder).absolute().parents):
            yield parent / ".venv"
    for entry in os.environ.get("PATH", "").split(os.pathsep):
        if Path(entry).name == "bin":
            yield Path(entry).parent
    yield Path(sys.base_prefix)
