"""A stand-in for the package sparse: the documented attributes of its formats, no more."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class SparseArray:
    """What all formats have in common, see https://sparse.pydata.org."""

    def __init__(self, shape: Sequence[int], dtype: Any, fill_value: Any = None) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self.fill_value = np.zeros((), dtype)[()] if fill_value is None else fill_value

    @property
    def ndim(self) -> int:
        return len(self.shape)


class COO(SparseArray):
    """Sorted by coordinates, which occur once."""

    def __init__(
        self,
        coords: Any,
        data: Any = None,
        shape: Sequence[int] | None = None,
        has_duplicates: bool = True,
        sorted: bool = False,
        fill_value: Any = None,
    ) -> None:
        if data is None:  # a dense array
            dense = coords
            coords, data, shape = np.stack(dense.nonzero()), dense[dense.nonzero()], dense.shape
        assert shape is not None
        assert coords.shape == (len(shape), len(data))
        super().__init__(shape, data.dtype, fill_value)
        key = np.ravel_multi_index(tuple(coords), self.shape) if coords.size else np.zeros(0, int)
        assert has_duplicates or len(np.unique(key)) == len(key)
        assert not sorted or (np.sort(key) == key).all()
        keys, row = np.unique(key, return_inverse=True)
        self.data = np.zeros(len(keys), data.dtype)
        np.add.at(self.data, row, data)
        self.coords = np.stack(np.unravel_index(keys, self.shape)) if coords.size else coords

    @classmethod
    def from_numpy(cls, dense: Any) -> "COO":
        return cls(dense)

    @property
    def nnz(self) -> int:
        return len(self.data)

    def asformat(self, format: str) -> "COO":
        assert format == "coo"
        return self

    def astype(self, dtype: Any) -> "COO":
        return COO(self.coords, self.data.astype(dtype), self.shape)

    def todense(self) -> Any:
        dense = np.full(self.shape, self.fill_value, self.dtype)
        dense[tuple(self.coords)] = self.data
        return dense


class GCXS(SparseArray):
    """A format without coordinates, which converts to `COO`."""

    def __init__(self, dense: Any) -> None:
        super().__init__(dense.shape, dense.dtype)
        self._dense = dense

    @classmethod
    def from_numpy(cls, dense: Any) -> "GCXS":
        return cls(dense)

    def asformat(self, format: str) -> COO:
        assert format == "coo"
        return COO(self._dense)


class DOK(GCXS):
    pass


def random(shape: Sequence[int], density: float) -> COO:
    generator = np.random.default_rng(0)
    return COO(generator.random(shape) * (generator.random(shape) < density))
