"""Where the queries of a batch are."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._utils.checks import check_finite, check_offsets, check_tensor, reads_contents, refuse
from ._utils.collation import batched_by_cat
from ._utils.ragged import batch_ids, offsets_from_counts
from ._utils.ragged_tuples import cat_ragged
from .pyramid import FeaturePyramid
from .windows import check_position_dtype, warn_if_normalized


@batched_by_cat
class QueryPlacement(NamedTuple):
    """Where the queries of a batch are: positions, images and levels.

    What `plan_neighborhoods`, ``make_plan`` and ``forward`` of the attention modules take.

    Attributes:
        positions: floating ``[N, P]``, in cells of the full shape.
        offsets: int64 ``[B + 1]``: image ``b`` owns the queries ``offsets[b]:offsets[b + 1]``.
        levels: int64 ``[N]``, the pyramid level of each query, or None: the level with the most
            cells.

    Example:
        ```python
        import torch
        from vicinal import QueryPlacement

        positions = 64 * torch.rand(2, 5, 2)  # two images, five queries each
        padding = torch.zeros(2, 5, dtype=torch.bool)
        padding[1, 3:] = True  # the second image has three queries
        placement = QueryPlacement.from_padded(positions, padding)
        assert placement.offsets.tolist() == [0, 5, 8]
        ```
    """

    positions: Tensor
    offsets: Tensor
    levels: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of ``make_plan`` and of an attention module's call, by name:
        ``block(query, **placement.arguments(), stacked_feature_maps=pyramid)``.
        """
        return {
            "query_spatial_positions": self.positions,
            "query_batch_offsets": self.offsets,
            "query_level_indices": self.levels,
        }

    @classmethod
    def of_points(cls, pyramid: FeaturePyramid) -> "QueryPlacement":
        """The placement where every point is a query, at the center of its cell, on its level.

        The positions' dtype is that of the values, widened until it holds the map's cells. On a GPU
        this synchronizes.

        Raises:
            ValueError: the points are not sorted by image.
        """
        dtype = pyramid.values.dtype
        dtype = dtype if dtype.is_floating_point else torch.float32
        return cls(pyramid.positions(dtype), pyramid.batch_offsets(), pyramid.levels)

    @classmethod
    def cat(cls, parts: Sequence["QueryPlacement"]) -> "QueryPlacement":
        """The placement of the queries of several batches, one after another.

        Args:
            parts: at least one. Either all of them have levels, or none has.

        Raises:
            ValueError: there is no part, parts differ in width, dtype, device or in whether they
                have levels, or the offsets of a part do not rise from 0 to its number of queries.

        Example:
            ```python
            import torch
            from vicinal import QueryPlacement

            parts = [QueryPlacement(64 * torch.rand(n, 2), torch.tensor([0, n])) for n in (3, 5)]
            assert QueryPlacement.cat(parts).offsets.tolist() == [0, 3, 8]
            ```
        """
        return cat_ragged(cls, parts)

    @classmethod
    def from_padded(
        cls, positions: Tensor, mask: Tensor | None = None, levels: Tensor | None = None
    ) -> "QueryPlacement":
        """The placement of queries that are padded to the same number for every image.

        The other inputs become rows in the same way, ``query[~mask]``, and the results are put back
        by ``padded[~mask] = out``. On a GPU this synchronizes.

        Args:
            positions: floating ``[B, n, P]``, in cells of the full shape.
            mask: bool ``[B, n]``, True: padding, as the ``key_padding_mask`` of PyTorch's
                attention. None (default): no padding.
            levels: integer ``[B, n]``, the level of each query, or None (default).

        Raises:
            ValueError: shapes, dtypes or devices do not match.
        """
        positions = check_tensor("positions", positions, ("B", "n", "P"), kind="floating")
        shape, device = positions.shape[:2], positions.device
        if levels is not None:
            levels = check_tensor("levels", levels, shape, kind="integer", device=device)
        if mask is None:
            mask = torch.zeros(shape, dtype=torch.bool, device=device)
        valid = ~check_tensor("mask", mask, shape, kind="bool", device=device)
        offsets = offsets_from_counts(valid.sum(1))
        return cls(positions[valid], offsets, None if levels is None else levels[valid])


def check_placement(
    positions: Tensor, offsets: Tensor, pyramid: FeaturePyramid, check_contents: bool | None = None
) -> tuple[Tensor, Tensor, FeaturePyramid]:
    """Returns positions and offsets as tensors, and offsets and pyramid of the same images.

    Raises:
        ValueError: they cannot be those of queries on the pyramid.
    """
    device = pyramid.coordinates.device
    name, shape = "query_spatial_positions", ("N", pyramid.position_dim)
    positions = check_tensor(name, positions, shape, kind="floating", device=device)
    check_position_dtype(name, positions, pyramid.level_shapes)
    offsets = check_tensor(
        "query_batch_offsets", offsets, ("B + 1",), kind="integer", device=device
    )
    if not offsets.shape[0]:
        refuse("query_batch_offsets", "at least one number", offsets)
    if reads_contents(check_contents, device):
        check_offsets("query_batch_offsets", offsets, len(positions))
        check_finite(name, positions)
    warn_if_normalized(name, positions, pyramid.level_shapes)
    n_missing = pyramid.batch_size - (offsets.shape[0] - 1)
    if n_missing < 0:
        n_images = offsets.shape[0] - 1
        pyramid = dataclasses.replace(pyramid, batch_size=n_images, check_contents=False)
    elif n_missing > 0:  # images without queries
        offsets = torch.cat((offsets, offsets[-1:].expand(n_missing)))
    return positions, offsets, pyramid


def query_images(positions: Tensor, offsets: Tensor, batch_size: int) -> Tensor:
    """int64 ``[N]``: the image of each query, -1 for an invalid query.

    A query is invalid if it belongs to no image by ``offsets`` ``[B + 1]``, or if its position
    ``[N, P]`` is not finite.
    """
    image = batch_ids(offsets, positions.shape[0])
    invalid = (image >= batch_size) | ~positions.isfinite().all(1)
    return image.masked_fill(invalid, -1)
