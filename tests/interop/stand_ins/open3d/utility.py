"""Vectors of rows."""

from typing import Any

import numpy as np


class Vector3dVector:
    """Rows of three float64, which NumPy reads without a copy."""

    def __init__(self, rows: Any) -> None:
        self._rows = np.array(rows, np.float64)
        assert self._rows.ndim == 2
        assert self._rows.shape[1] == 3

    def __len__(self) -> int:
        return len(self._rows)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self._rows
