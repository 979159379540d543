"""Results of functions that are kept for later calls."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def cached(find: Callable[..., T]) -> Callable[..., T]:
    """``find`` that keeps its results, but not in compiled code: compilers warn of such caches.

    The arguments are hashable, and the results must not be changed.
    """
    keeping = functools.lru_cache(maxsize=256)(find)

    @functools.wraps(find)
    def run(*arguments: Any) -> T:
        return find(*arguments) if torch.compiler.is_compiling() else keeping(*arguments)

    return run
