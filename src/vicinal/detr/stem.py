"""From raw points to a pyramid of embeddings, without sparse convolutions."""

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
    """Embeds points by what is in the cells around them, and pools them into a pyramid.

    Each point sees its windows of the raw values, at strides of its own, spelled out cell by cell,
    as an image's patches are in Vision Transformers (Dosovitskiy et al., 2021); and where in its
    cell of each level it lies, which tells the pooled points how their parts are spread.

    For values of few channels: it stores ``points x cells of the windows x channels``.

    Args:
        in_channels: of the raw values.
        embed_dim: E.
        strides: of the pyramid's levels, in cells of the grid.
        window_sizes: odd width of the window that a point sees at each of ``window_strides``.
        window_strides: strides of the windows' cells, of which the first is 1.
        position_dim: number of spatial dimensions, P.

    Raises:
        ValueError: sizes below 1, windows that are not odd or not one per stride, a first window
            of another stride than 1.
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
        self.in_channels, self.position_dim = in_channels, position_dim
        self.strides, self.window_strides = tuple(strides), tuple(window_strides)
        self.window_sizes = tuple(window_sizes)
        slots = sum(size**position_dim for size in self.window_sizes)
        # Of each cell its values and whether it exists.
        features = slots * (in_channels + 1) + position_dim * len(self.strides)
        self.layers = nn.Sequential(
            nn.Linear(features, embed_dim),
            nn.GELU(),
            nn.Linear(embed_dim, embed_dim),
            nn.GELU(),
        )
        self.mixes = nn.ModuleList(nn.Linear(embed_dim, embed_dim) for _ in self.strides)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(
        self, coordinates: Tensor, values: Tensor, spatial_shape: Sequence[int], batch_size: int
    ) -> FeaturePyramid:
        """A pyramid with embeddings ``[nnz, E]``, sorted by image.

        Args:
            coordinates: integer ``[n, P + 1]``: image, then cell along each axis of the grid.
                Points that share a cell are pooled.
            values: ``[n, in_channels]``.
            spatial_shape: sizes of the grid.
            batch_size: number of images.

        Raises:
            ValueError: shapes, dtypes or devices do not fit, or points lie outside the grid.
        """
        if not isinstance(spatial_shape, Sequence) or len(spatial_shape) != self.position_dim:
            refuse("spatial_shape", f"{self.position_dim} sizes", spatial_shape)
        check_tensor("values", values, ("n", self.in_channels), kind="floating")
        check_tensor(
            "coordinates",
            coordinates,
            (len(values), self.position_dim + 1),
            kind="integer",
            device=values.device,
        )
        raw = FeaturePyramid.from_points(
            coordinates,
            torch.cat((values, values.new_ones(len(values), 1)), 1),
            spatial_shape,
            batch_size,
            strides=self.window_strides,
        )
        points = (raw.levels == 0).nonzero().flatten()
        cells = raw.coordinates[points, :-1]
        seen = torch.cat((self._windows(raw, points), self._places(cells, values)), 1)
        pyramid = FeaturePyramid.from_points(
            cells, self.layers(seen), spatial_shape, batch_size, strides=self.strides
        )
        # Embeddings have the dtype of the values, under autocast too.
        mixed = values.new_empty(pyramid.values.shape)
        for level, mix in enumerate(self.mixes):
            rows = (pyramid.levels == level).nonzero().flatten()
            mixed = mixed.index_copy(0, rows, mix(pyramid.values[rows]).to(mixed.dtype))
        return pyramid.with_values(self.norm(mixed))

    def _windows(self, raw: FeaturePyramid, points: Tensor) -> Tensor:
        """``[n, cells of the windows * (channels + 1)]``, zero where nothing is stored."""
        positions, image = raw.positions(raw.values.dtype)[points], raw.batch[points]
        offsets = offsets_from_ids(image, raw.batch_size)
        plan = plan_neighborhoods(positions, offsets, raw, self.window_sizes, check_contents=False)
        row, point, slot = list_pairs(
            plan._tensors, torch.arange(len(points), device=points.device)
        )
        windows = raw.values.new_zeros(len(points), plan.window_slots, raw.embed_dim)
        return windows.index_put((row, slot), raw.values[point]).flatten(1)

    def _places(self, cells: Tensor, like: Tensor) -> Tensor:
        """``[n, P * levels]``: where in its cell of each level a point is, from -1/2 to 1/2."""
        strides = constant(self.strides, cells.device)
        place = cells[:, 1:, None] % strides
        return ((place.to(like.dtype) + 0.5) / strides - 0.5).flatten(1)
