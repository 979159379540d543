"""The CPU back end: C++ on PyTorch's stable ABI (`cpu.cpp`), loaded on first use."""

import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .library import attend

__all__ = ["attend", "unavailable"]


def unavailable(q: Tensor) -> str | None:
    """Why this back end cannot run on ``q``, or None if it can."""
    if q.device.type != "cpu":
        return f"it runs on the CPU and q is on {q.device}"
    return _load()


@functools.cache
def _load() -> str | None:
    """Loads the compiled kernel once. Returns, and warns of, what is in the way."""
    libraries = sorted(Path(__file__).parent.glob("_cpu*.so"))
    if not libraries:
        problem = "its kernel was not built when vicinal was installed (is there a C++ compiler?)"
    else:
        try:
            torch.ops.load_library(str(libraries[0]))
            return None
        except OSError as error:
            problem = f"its kernel does not load: {error}"
    warnings.warn(
        f"vicinal: backend 'cpu' is missing, {problem}; attention falls back on the slower "
        "backend 'reference'",
        RuntimeWarning,
        stacklevel=2,
    )
    return problem
