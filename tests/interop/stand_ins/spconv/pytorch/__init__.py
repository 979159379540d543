"""A stand-in for spconv, where its wheel is not installed: what `SparseConvTensor` documents."""

from collections.abc import Sequence

import torch
from torch import Tensor


class SparseConvTensor:
    def __init__(
        self, features: Tensor, indices: Tensor, spatial_shape: Sequence[int], batch_size: int
    ) -> None:
        assert features.dim() == 2
        assert indices.dim() == 2
        assert indices.dtype == torch.int32
        assert indices.shape[1] == len(spatial_shape) + 1
        self.features, self.indices = features, indices
        self.spatial_shape, self.batch_size = list(spatial_shape), batch_size

    def replace_feature(self, feature: Tensor) -> "SparseConvTensor":
        return SparseConvTensor(feature, self.indices, self.spatial_shape, self.batch_size)
