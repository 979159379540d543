"""Types of arguments that are taken in several forms."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class ArrayLike(Protocol):
    """An array of NumPy, or of a library with the same protocol."""

    def __array__(self) -> Any: ...


# A stride, or one per level, each an int or one int per axis.
StridesLike = int | Sequence[int | Sequence[int]] | Tensor | ArrayLike
# (low, high) of each axis, or None for an axis.
BoundsLike = Sequence[Sequence[float] | Tensor | ArrayLike | None] | Tensor | ArrayLike
