"""The stem: from points with raw values to a pyramid of embeddings, without convolutions."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._utils.checks import check_counts, check_tensor, refuse
from .._utils.constants import constant
from .._utils.ragged import offsets_from_ids
from ..backends.reference import list_pairs
from ..plan import plan_neighborhoods
from ..pyramid import FeaturePyramid


class PointStem(nn.Module):
    """Embeds points by the raw values in windows around them, and pools them into a pyramid.

    The features of a point are the raw values of all cells of its windows, concatenated as the
    pixels of a patch are in Vision Transformers (Dosovitskiy et al., "An Image is Worth 16x16
    Words", 2021), and its position within the cell that contains it at each level. A small network
    maps them to an embedding; embeddings of the points of a cell are averaged.

    Intended for values of few channels: memory grows with points x window cells x channels.

    Args:
        in_channels: number of channels of the raw values.
        embed_dim: width of the embeddings, E.
        strides: strides of the pyramid's levels, in cells of the grid; default (1, 2, 4, 8).
        window_sizes: odd width of each window, in cells of its stride; default (7, 7).
        window_strides: stride of each window's cells; the first is 1. Default (1, 2).
        position_dim: number of spatial dimensions, P; default 2.

    Raises:
        ValueError: a number is below 1, a window size is even, there is not one window size per
            window stride, or the first window stride is not 1.

    Example:
        ```python
        import torch
        from vicinal.detr import PointStem

        stem = PointStem(in_channels=1, embed_dim=8, strides=(1, 2))
        coordinates = torch.tensor([[0, 3, 4], [0, 3, 5], [1, 7, 7]])  # image, row, column
        pyramid = stem(coordinates, torch.rand(3, 1), spatial_shape=(8, 8), batch_size=2)
        assert pyramid.level_shapes == ((8, 8), (4, 4))
        assert pyramid.embed_dim == 8
        ```
    """

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        strides: Sequence[int] = (1, 2, 4, 8),
        window_sizes: Sequence[int] = (7, 7),
        window_strides: Sequence[int] = (1, 2),
        position_dim: int = 2,
    ) -> None:
        super().__init__()
        check_counts(in_channels=in_channels, embed_dim=embed_dim, position_dim=position_dim)
        _check_windows(strides, window_sizes, window_strides)
        self.in_channels, self.position_dim = in_channels, position_dim
        self.strides, self.window_strides = tuple(strides), tuple(window_strides)
        self.window_sizes = tuple(window_sizes)
        n_cells = sum(size**position_dim for size in self.window_sizes)
        # Each cell has its values and a flag for whether it is stored.
        n_features = n_cells * (in_channels + 1) + position_dim * len(self.strides)
        self.layers = nn.Sequential(
            nn.Linear(n_features, embed_dim),
            nn.GELU(),
            nn.Linear(embed_dim, embed_dim),
            nn.GELU(),
        )
        self.mixes = nn.ModuleList(nn.Linear(embed_dim, embed_dim) for _ in self.strides)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(
        self, coordinates: Tensor, values: Tensor, spatial_shape: Sequence[int], batch_size: int
    ) -> FeaturePyramid:
        """Builds a pyramid from points.

        Args:
            coordinates: integer ``[n, P + 1]``: image, then the cell along each axis of the grid.
                Values of points that share a cell are averaged.
            values: floating ``[n, in_channels]``.
            spatial_shape: P sizes of the grid.
            batch_size: number of images.

        Returns:
            a pyramid with embeddings ``[nnz, E]`` in the dtype of ``values``, sorted by image.

        Raises:
            ValueError: shapes, dtypes or devices do not match, or points lie outside the grid.
        """
        self._check_points(coordinates, values, spatial_shape)
        raw = FeaturePyramid.from_points(
            coordinates,
            torch.cat((values, values.new_ones(len(values), 1)), 1),
            spatial_shape,
            batch_size,
            strides=self.window_strides,
        )
        points = (raw.levels == 0).nonzero().flatten()
        cells = raw.coordinates[points, :-1]
        features = torch.cat((self._windows(raw, points), self._cell_offsets(cells, values)), 1)
        pyramid = FeaturePyramid.from_points(
            cells, self.layers(features), spatial_shape, batch_size, strides=self.strides
        )
        # Embeddings have the dtype of the values, under autocast too.
        mixed = values.new_empty(pyramid.values.shape)
        for level, mix in enumerate(self.mixes):
            rows = (pyramid.levels == level).nonzero().flatten()
            mixed = mixed.index_copy(0, rows, mix(pyramid.values[rows]).to(mixed.dtype))
        return pyramid.with_values(self.norm(mixed))

    def _check_points(
        self, coordinates: Tensor, values: Tensor, spatial_shape: Sequence[int]
    ) -> None:
        if not isinstance(spatial_shape, Sequence) or len(spatial_shape) != self.position_dim:
            refuse("spatial_shape", f"{self.position_dim} sizes", spatial_shape)
        check_tensor("values", values, ("n", self.in_channels), kind="floating")
        shape = (len(values), self.position_dim + 1)
        check_tensor("coordinates", coordinates, shape, kind="integer", device=values.device)

    def _windows(self, raw: FeaturePyramid, points: Tensor) -> Tensor:
        """``[n, window cells * (channels + 1)]``, the raw values, zero in empty cells."""
        positions, image = raw.positions(raw.values.dtype)[points], raw.batch[points]
        offsets = offsets_from_ids(image, raw.batch_size)
        plan = plan_neighborhoods(positions, offsets, raw, self.window_sizes, check_contents=False)
        row, point, slot = list_pairs(
            plan._tensors, torch.arange(len(points), device=points.device)
        )
        windows = raw.values.new_zeros(len(points), plan.window_slots, raw.embed_dim)
        return windows.index_put((row, slot), raw.values[point]).flatten(1)

    def _cell_offsets(self, cells: Tensor, like: Tensor) -> Tensor:
        """``[n, P * levels]``: offsets from the center of the point's cell at each level.

        In units of that level's cells, in (-1/2, 1/2).
        """
        strides = constant(self.strides, cells.device)
        remainder = cells[:, 1:, None] % strides
        return ((remainder.to(like.dtype) + 0.5) / strides - 0.5).flatten(1)


def _check_windows(
    strides: Sequence[int], window_sizes: Sequence[int], window_strides: Sequence[int]
) -> None:
    for name, numbers in {
        "strides": strides,
        "window_sizes": window_sizes,
        "window_strides": window_strides,
    }.items():
        if not numbers or any(not isinstance(n, int) or n < 1 for n in numbers):
            refuse(name, "integers of at least 1", str(list(numbers)))
    if window_strides[0] != 1:
        refuse("window_strides", "strides that begin with 1", str(list(window_strides)))
    if len(window_sizes) != len(window_strides) or any(n % 2 == 0 for n in window_sizes):
        expected = f"an odd width for each of {len(window_strides)} window_strides"
        refuse("window_sizes", expected, str(list(window_sizes)))
