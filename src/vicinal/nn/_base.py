"""What attention modules are given, and what of it they refuse."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._utils.checks import (
    as_level_shapes,
    check_counts,
    check_range,
    check_tensor,
    reads_contents,
    refuse,
)
from ..attention import autocasts
from ..pyramid import FeaturePyramid


def check_sizes(embed_dim: int, n_heads: int, **others: int) -> None:
    """Refuses sizes below one, and an ``embed_dim`` that the heads cannot share."""
    check_counts(embed_dim=embed_dim, n_heads=n_heads, **others)
    if embed_dim % n_heads:
        refuse("embed_dim", f"a multiple of n_heads ({n_heads})", embed_dim)


class Expected(NamedTuple):
    """The sizes, dtype and device of a module, which its arguments should fit."""

    embed_dim: int
    n_levels: int
    position_dim: int
    dtype: torch.dtype
    device: torch.device

    def check_queries(
        self,
        query: Tensor,
        positions: Tensor,
        background: Tensor | None,
        levels: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """Refuses what ``forward`` is given beside the map, all but the offsets."""
        device = self.device
        check_tensor("query", query, ("N", self.embed_dim), kind="floating", device=device)
        self._check_dtype("query", query)
        n = query.shape[0]
        where = (n, self.position_dim)
        check_tensor("query_spatial_positions", positions, where, kind="floating", device=device)
        if background is not None:
            cells = ("B", self.n_levels, self.embed_dim)
            check_tensor("background_embedding", background, cells, kind="floating", device=device)
            self._check_dtype("background_embedding", background)
        if levels is not None:
            check_tensor("query_level_indices", levels, (n,), kind="integer", device=device)
            if reads_contents(None, device):
                check_range("query_level_indices", levels, self.n_levels)
        if mask is not None:
            check_tensor("query_mask", mask, (n,), kind="bool", device=device)

    def pyramid(
        self,
        maps: Tensor | FeaturePyramid,
        level_spatial_shapes: Tensor | Sequence[Sequence[int]] | None,
        background: Tensor | None,
    ) -> FeaturePyramid:
        """The map, sparse COO or a pyramid already, as a pyramid."""
        if not isinstance(maps, FeaturePyramid | Tensor):
            refuse("stacked_feature_maps", "a sparse COO tensor or a FeaturePyramid", maps)
        shapes = None if level_spatial_shapes is None else as_level_shapes(level_spatial_shapes)
        if isinstance(maps, FeaturePyramid):
            if shapes not in (None, maps.level_shapes):
                refuse("level_spatial_shapes", f"the pyramid's {maps.level_shapes}", str(shapes))
            shapes = maps.level_shapes
        elif shapes is None:
            refuse("level_spatial_shapes", "[L, P] sizes beside a sparse tensor", None)
        if (len(shapes), len(shapes[0])) != (self.n_levels, self.position_dim):
            expected = f"{self.n_levels} levels of {self.position_dim} sizes"
            refuse("level_spatial_shapes", expected, str(shapes))
        values = maps.values if isinstance(maps, FeaturePyramid) else maps
        if values.shape[-1:] != (self.embed_dim,) or values.device != self.device:
            expected = f"embeddings of width {self.embed_dim} on {self.device}"
            refuse("stacked_feature_maps", expected, values)
        self._check_dtype("stacked_feature_maps", values)
        if isinstance(maps, Tensor):
            maps = FeaturePyramid.from_coo(maps, shapes)
        if background is not None and background.shape[0] != maps.batch_size:
            refuse("background_embedding", f"{maps.batch_size} images", background)
        return maps

    def _check_dtype(self, argument: str, value: Tensor) -> None:
        if value.dtype != self.dtype and not autocasts(value.device):
            refuse(argument, f"the dtype of the module, {self.dtype}", value)
