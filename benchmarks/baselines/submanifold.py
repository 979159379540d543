"""A U-Net of submanifold convolutions by spconv, whose convolutions see occupied cells alone.

Graham et al., "3D Semantic Segmentation with Submanifold Sparse Convolutional Networks" (2018).
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vicinal import FeaturePyramid


def _import_spconv() -> Any:
    """spconv, whose backward pass asks for a CUDA stream on a CPU too, which does not use it."""
    spconv = importlib.import_module("spconv.pytorch")
    if not torch.cuda.is_available():
        spconv.ops.get_current_stream = lambda: 0
    return spconv


class SubmanifoldUNet(nn.Module):
    """Predicts the classes of points, with the call signature of `PointUNet`.

    A stage has two layers for each layer of the `PointUNet` and at least one, each a convolution
    of 3 cells along every axis, batch norm and ReLU. spconv knows no periodic axes, so that an
    event is cut at the seam.

    Args:
        in_channels: number of channels of the raw values.
        n_classes: number of classes.
        embed_dims: width of every level.
        strides: P strides of every level, each a multiple of the one before.
        depths: layers of a `PointUNet` on every level.
    """

    def __init__(
        self,
        in_channels: int,
        n_classes: int,
        embed_dims: Sequence[int],
        strides: Sequence[Sequence[int]],
        depths: Sequence[int],
    ) -> None:
        super().__init__()
        spconv = _import_spconv()
        self.tensor = spconv.SparseConvTensor
        dim = len(strides[0])
        native = {"bias": False, "algo": spconv.ConvAlgo.Native}  # the one of CPUs
        near, coarser = (getattr(spconv, f"{name}Conv{dim}d") for name in ("SubM", "Sparse"))
        finer = getattr(spconv, f"SparseInverseConv{dim}d")

        def layer(convolution: Any, fine: int, coarse: int, *size: Any, **key: Any) -> Any:
            norm = nn.BatchNorm1d(coarse), nn.ReLU()
            return spconv.SparseSequential(convolution(fine, coarse, *size, **key, **native), *norm)

        def stage(level: int, width: int) -> Any:
            widths = [width, *[embed_dims[level]] * max(2 * depths[level], 1)]
            pairs = itertools.pairwise(widths)
            layers = (layer(near, *pair, 3, indice_key=f"near{level}") for pair in pairs)
            return spconv.SparseSequential(*layers)

        n = len(strides)
        self.first = layer(near, in_channels, embed_dims[0], 3, indice_key="near0")
        self.encoder = nn.ModuleList(stage(level, embed_dims[level]) for level in range(n))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, (fine, coarse) in enumerate(itertools.pairwise(embed_dims)):
            pairs = zip(strides[level], strides[level + 1], strict=True)
            size, key = [large // small for small, large in pairs], {"indice_key": f"to{level}"}
            self.down.append(layer(coarser, fine, coarse, size, size, **key))
            self.up.append(layer(finer, coarse, fine, size, **key))
        self.decoder = nn.ModuleList(stage(level, 2 * embed_dims[level]) for level in range(n - 1))
        self.head = nn.Linear(embed_dims[0], n_classes)

    def forward(
        self,
        coordinates: Tensor,
        values: Tensor,
        spatial_shape: tuple[int, ...],
        batch_size: int,
        periodic_axes: tuple[int, ...] = (),
    ) -> Tensor:
        """Logits ``[n, C]``; points that share a cell have the same ones."""
        options: dict[str, Any] = {"strides": (1,), "pooling": "mean", "keep_point_rows": True}
        cells = FeaturePyramid.from_points(
            coordinates, values, spatial_shape, batch_size, **options
        )
        assert cells.point_rows is not None
        indices = cells.coordinates[:, :-1].int().contiguous()
        x = self.first(self.tensor(cells.values, indices, list(spatial_shape), batch_size))
        skipped = []
        for level, stage in enumerate(self.encoder):
            x = stage(self.down[level - 1](x) if level else x)
            skipped.append(x)
        for level in reversed(range(len(self.up))):
            fine, coarse = skipped[level], self.up[level](x)
            joined = fine.replace_feature(torch.cat((fine.features, coarse.features), 1))
            x = self.decoder[level](joined)
        logits: Tensor = self.head(x.features)
        return logits[cells.point_rows[:, 0]]
