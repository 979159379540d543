"""A stand-in for `Points` of WarpConvNet."""

from torch import Tensor

from ..base import Geometry


class Points(Geometry):
    def __init__(
        self, batched_coordinates: Tensor, batched_features: Tensor, offsets: Tensor
    ) -> None:
        assert batched_coordinates.is_floating_point()
        super().__init__(batched_coordinates, batched_features, offsets)
