"""A stand-in for MinkowskiEngine: the documented attributes of its `SparseTensor`, no more.

Of points that share coordinates it keeps one, as the documented default of the class does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class CoordinateManager:
    def __init__(self, D: int) -> None:  # noqa: N803
        self.D = D


class SparseTensor:
    def __init__(
        self,
        features: Tensor,
        coordinates: Tensor | None = None,
        tensor_stride: int | Sequence[int] = 1,
        coordinate_map_key: Any = None,
        coordinate_manager: CoordinateManager | None = None,
    ) -> None:
        assert features.ndim == 2
        if coordinates is None:
            assert coordinate_map_key is not None
            assert coordinate_manager is not None
            coordinates, stride = coordinate_map_key
            assert len(features) == len(coordinates)
        else:
            assert coordinates.dtype == torch.int32
            assert len(features) == len(coordinates)
            dim = coordinates.shape[1] - 1
            stride = [tensor_stride] * dim if isinstance(tensor_stride, int) else tensor_stride
            assert len(stride) == dim
            first = _first_rows(coordinates)
            features, coordinates = features[first], coordinates[first]
        self.F = self.features = features
        self.C = self.coordinates = coordinates
        self.tensor_stride = list(stride)
        self.coordinate_map_key = coordinates, self.tensor_stride
        self.coordinate_manager = coordinate_manager or CoordinateManager(coordinates.shape[1] - 1)


def _first_rows(coordinates: Tensor) -> Tensor:
    """The first row of every distinct one."""
    distinct, row = coordinates.unique(dim=0, return_inverse=True)
    first = torch.full((len(distinct),), len(coordinates))
    return first.scatter_reduce(0, row, torch.arange(len(coordinates)), "amin").sort().values
