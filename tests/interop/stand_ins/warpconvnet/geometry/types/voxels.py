"""A stand-in for `Voxels` of WarpConvNet."""

from collections.abc import Sequence

from torch import Tensor

from ..base import Geometry


class Voxels(Geometry):
    def __init__(
        self,
        batched_coordinates: Tensor,
        batched_features: Tensor,
        offsets: Tensor,
        tensor_stride: int | Sequence[int] | None = None,
        voxel_size: float | None = None,
    ) -> None:
        assert not batched_coordinates.is_floating_point()
        super().__init__(batched_coordinates, batched_features, offsets)
        dim = batched_coordinates.shape[1]
        self.tensor_stride = (
            (tensor_stride,) * dim
            if isinstance(tensor_stride, int)
            else None
            if tensor_stride is None
            else tuple(tensor_stride)
        )
        self.voxel_size = voxel_size
        self.extra_attributes = {"tensor_stride": self.tensor_stride, "voxel_size": voxel_size}
