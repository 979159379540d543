"""Types of arguments that are taken in several forms, or that are one of a few words."""

from collections.abc import Sequence
from enum import Enum
from typing import Any, Literal, Protocol

from torch import Tensor


class ArrayLike(Protocol):
    """An array of NumPy, or of a library with the same protocol."""

    def __array__(self) -> Any: ...


# A stride, or one per level, each an int or one int per axis.
StridesLike = int | Sequence[int | Sequence[int]] | Tensor | ArrayLike
# (low, high) of each axis, or None for an axis.
BoundsLike = Sequence[Sequence[float] | Tensor | ArrayLike | None] | Tensor | ArrayLike
# How the points of a cell become one.
Pooling = Literal["mean", "sum", "max"]
# The back end of ops; None: chosen by device and dtype.
BackendName = Literal["cpu", "triton", "reference"]
# The coordinates of each group of frequencies, or an enum with such a value.
FreqGroupsLike = Literal["single", "partition", "closure"] | Enum
# The part of a map that is drawn, or its low and high corner ``[2, P]``.
CropLike = Literal["occupied", "map"] | Tensor
# The heads that are drawn: their mean, each, or these.
HeadsLike = Literal["mean", "each"] | Sequence[int]
