"""Triton's interpreter with a check of addresses, for the fixture `checked`."""

import importlib.util
from collections.abc import Iterator
from typing import Any

from torch import Tensor

if importlib.util.find_spec("numpy"):  # tests on a GPU need none
    import numpy as np


class Checked:
    """Triton's interpreter, with a check that kernels stay inside the tensors they were given."""

    def __init__(self, plain: Any) -> None:
        self._plain = plain
        self.ranges = np.zeros((0, 2), dtype=np.uint64)
        self.n_checked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def allow(self, arguments: Any) -> None:
        storages = [x.untyped_storage() for x in _tensors(arguments)]
        ranges = [(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in storages]
        self.ranges = np.array(ranges, dtype=np.uint64)

    def _check(self, addresses: Any, mask: Any, n_bytes: int) -> None:
        used = addresses[mask].ravel()
        inside = np.zeros(used.shape, dtype=bool)
        for start, stop in self.ranges:
            inside |= (used >= start) & (used + np.uint64(n_bytes) <= stop)
        self.n_checked += inside.size
        assert inside.all(), "a kernel accessed memory out of bounds"

    def load(self, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._check(addresses, mask, np.dtype(dtype).itemsize)
        return self._plain.load(addresses, mask, other, dtype)

    def store(self, addresses: Any, value: Any, mask: Any) -> Any:
        self._check(addresses, mask, value.dtype.itemsize)
        return self._plain.store(addresses, value, mask)


def _tensors(arguments: Any) -> Iterator[Tensor]:
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, tuple):
            yield from _tensors(x)
