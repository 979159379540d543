"""A stand-in for torchsparse 2.1: the documented attributes of its `SparseTensor`, no more."""

from collections.abc import Sequence

from torch import Tensor


class SparseTensor:
    """Image first in ``coords``, see https://torchsparse-docs.github.io."""

    def __init__(
        self,
        feats: Tensor,
        coords: Tensor,
        stride: int | Sequence[int] = 1,
        spatial_range: tuple[int, ...] | None = None,
    ) -> None:
        assert coords.shape == (len(feats), 4)
        self.feats = feats
        self.coords = coords
        self.stride = (stride,) * 3 if isinstance(stride, int) else tuple(stride)
        self.spatial_range = spatial_range
