"""What `Voxels` and `Points` have in common: their documented attributes, no more."""

from typing import Any, TypeVar

from torch import Tensor

GeometryT = TypeVar("GeometryT", bound="Geometry")


class Geometry:
    def __init__(self, coordinates: Tensor, features: Tensor, offsets: Tensor) -> None:
        assert len(coordinates) == len(features) == int(offsets[-1])
        assert int(offsets[0]) == 0
        self.coordinate_tensor, self.feature_tensor = coordinates, features
        self.offsets = offsets
        self.extra_attributes: dict[str, Any] = {}

    @property
    def batch_size(self) -> int:
        return len(self.offsets) - 1

    def replace(self: GeometryT, batched_features: Tensor) -> GeometryT:
        return type(self)(
            self.coordinate_tensor,
            batched_features,
            offsets=self.offsets,
            **self.extra_attributes,
        )
