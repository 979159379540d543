"""A stand-in for the sparse tensors of TRELLIS: their documented attributes, no more."""

import torch
from torch import Tensor


class SparseTensor:
    """Rows of one image are next to each other; ``layout`` has their slice."""

    def __init__(
        self,
        feats: Tensor,
        coords: Tensor,
        shape: torch.Size | None = None,
        layout: list[slice] | None = None,
    ) -> None:
        images = coords[:, 0]
        assert coords.shape == (len(feats), 4)
        assert coords.min() >= 0
        assert (images.diff() >= 0).all()
        self.feats, self.coords = feats, coords
        self.shape = shape or torch.Size([int(images.max()) + 1, *feats.shape[1:]])
        lengths = torch.bincount(images, minlength=self.shape[0])
        ends = lengths.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        self.layout = layout or [slice(*ends) for ends in zip(starts, ends, strict=True)]

    def replace(self, feats: Tensor) -> "SparseTensor":
        shape = torch.Size([self.shape[0], *feats.shape[1:]])
        return SparseTensor(feats, self.coords, shape, self.layout)
