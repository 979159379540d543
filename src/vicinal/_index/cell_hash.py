"""A hash table of the occupied cells around each location, so that no map is ever dense."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._utils.checks import LevelShapes, check_ids, check_type, has_contents, refuse
from .._utils.collation import of_a_batch
from .._utils.constants import constant, trainable_tensors
from .._utils.ragged import expand_ranges, starts_from_counts
from ..pyramid import FeaturePyramid
from ..window_shapes import windows_on_axes
from .cell_keys import CellKeys
from .plan_checks import check_plan_facts, check_plan_points

# 2^64 divided by the golden ratio, as a signed integer: multiplicative hashing spreads runs of
# neighboring keys evenly (Knuth, "The Art of Computer Programming", volume 3, section 6.4).
_MULTIPLIER = -7046029254386353131
_FARTHEST = 2**62  # cells from the map's first one
_WINDOW = 3  # cells of a `CellKeys` window, enough for a cell and the next one, also at the edge


@of_a_batch
@dataclass(frozen=True, repr=False, eq=False)
class CellIndex:
    """The M occupied cells of a pyramid: the plan of `SparseDeformableAttention`.

    `SparseDeformableAttention.make_plan` makes it. It depends on the points' coordinates alone, so
    it serves any queries and values.

    The corners of a location are the ``2 ** P`` cells whose centers surround it. If any of them is
    occupied, the table has an entry for all of them under the key of the first.

    Attributes:
        cell_of_point: int64 ``[nnz]``, the index of every point's cell. Points may share a cell.
        n_cells: M.
        batch_size: number of images.
        level_shapes: the spatial shape of each level.
        periodic_axes: axes along which the map repeats.
        query_ids: integer ``[N]``, what dropout counts each query as; None: its row.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid, SparseDeformableAttention

        points = torch.tensor([[0, 3, 4], [0, 3, 4], [0, 9, 9]])  # image, row, column
        pyramid = FeaturePyramid.from_points(points, torch.ones(3, 8), (16, 16), 1, strides=(1, 2))
        attention = SparseDeformableAttention(embed_dim=8, n_heads=2, n_levels=2)
        positions, offsets = torch.tensor([[3.0, 4.0]]), torch.tensor([0, 1])
        plan = attention.make_plan(positions, offsets, pyramid)
        assert plan.n_cells == 4  # two on each level
        out = attention(torch.randn(1, 8), positions, offsets, pyramid, plan=plan)
        ```
    """

    cell_of_point: Tensor
    n_cells: int
    batch_size: int
    level_shapes: LevelShapes
    periodic_axes: tuple[int, ...]
    _coordinates: Tensor  # int64 [nnz, P + 2], of the points
    _origins: Tensor  # int64 [B, L], the key of each level's first cell
    _steps: Tensor  # int64 [P, L], from the key of a cell to that of the next along an axis
    _starts: Tensor  # int32 [buckets], the first entry of each
    _largest: int  # number of entries in the largest bucket
    _keys: Tensor  # int64 [entries], bucket by bucket; the last ones match no key
    _corners: Tensor  # int32 [entries, 2 ** P], row-major; M where a cell is empty
    query_ids: Tensor | None = None

    @property
    def n_points(self) -> int:
        """nnz, the number of points."""
        return self.cell_of_point.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of all its tensors."""
        return self.cell_of_point.device

    def coalesce(self, values: Tensor) -> Tensor:
        """Returns the sum over each cell's points of ``values`` ``[nnz, E]``, ``[M, E]``."""
        cells = values.new_zeros(self.n_cells, values.shape[1])
        return cells.index_add(0, self.cell_of_point, values)

    def with_dropout_ids(self, query_ids: Tensor) -> "CellIndex":
        """Returns the same index for queries that dropout counts by these ids.

        See `NeighborhoodPlan.with_dropout_ids`; there are no weights of points to drop here.

        Args:
            query_ids: integer ``[N]``, in ``[0, 2^31)``.

        Raises:
            ValueError: ``query_ids`` is not an integer tensor ``[N]`` on the index's device, or, on
                the CPU, an id is outside its range. `SparseDeformableAttention.forward` raises it
                if there is another number of queries.

        Example:
            ```python
            import torch
            from vicinal import FeaturePyramid, SparseDeformableAttention

            points = torch.tensor([[0, 3, 4], [0, 5, 4], [0, 9, 9]])  # image, row, column
            pyramid = FeaturePyramid.from_points(points, torch.ones(3, 8), (16, 16), 1)
            attention = SparseDeformableAttention(8, n_heads=2, n_levels=4, dropout=0.5)
            query, positions = torch.randn(3, 8), torch.rand(3, 2) * 16

            def attend(rows: torch.Tensor) -> torch.Tensor:
                call = query[rows], positions[rows], torch.tensor([0, len(rows)]), pyramid
                plan = attention.make_plan(*call[1:]).with_dropout_ids(rows)
                torch.manual_seed(0)
                return attention(*call, plan=plan)

            rows = torch.arange(3)
            parts = torch.cat((attend(rows[:1]), attend(rows[1:])))
            torch.testing.assert_close(parts, attend(rows))
            ```
        """
        ids = check_ids("query_ids", query_ids, "N", 2**31, self.device)
        return dataclasses.replace(self, query_ids=ids)

    def points_in(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Lists the points in ``cells`` int64 ``[n]``, cell by cell: the index into ``cells`` and
        the point, int64 ``[m]`` each.
        """
        order = self.cell_of_point.sort(stable=True).indices
        counts = torch.bincount(self.cell_of_point, minlength=self.n_cells)
        row, index = expand_ranges(starts_from_counts(counts)[cells], counts[cells])
        return row, order[index]

    def find(self, images: Tensor, levels: Tensor, firsts: Sequence[Tensor]) -> Tensor:
        """Returns the cells at the corners of locations, int32 ``[n, H, 2 ** P, S]``; M if empty.

        Args:
            images: int64 ``[n]``, in [0, B).
            levels: int64 ``[S]``.
            firsts: for each axis the coordinates ``[n, H, S]`` of the first corner, integers in a
                floating dtype, inside the map or not.
        """
        key = self._origins[images][:, None, levels]
        sizes = constant(self.level_shapes, self.device)[levels].t()
        axes = zip(firsts, self._steps[:, levels], sizes, strict=True)
        for axis, (first, step, size) in enumerate(axes):
            # All cells beyond the map are empty, so their distance does not matter. Those farther
            # than `_FARTHEST`, and NaN, are beyond it also along a periodic axis. The size of a
            # large map may not be representable in the dtype of the locations.
            cell = first.nan_to_num(-2).clamp(-_FARTHEST, _FARTHEST).long()
            if axis in self.periodic_axes:
                cell = torch.where(first.abs() <= _FARTHEST, cell.remainder(size), -2)
            key = key + cell.clamp(min=-2).minimum(size) * step
        wanted = key.flatten()
        start = self._starts.index_select(0, _bucket(wanted, len(self._starts)))
        entry = torch.full_like(start, len(self._keys) - 1)
        for step in range(self._largest):
            candidate = start + step
            found = self._keys.index_select(0, candidate) == wanted
            entry = torch.where(found, candidate, entry)
        corners: Tensor = self._corners.index_select(0, entry).unflatten(0, key.shape)
        return corners.transpose(2, 3).contiguous()

    def lookup_arguments(self) -> tuple[list[Tensor], list[int], list[int]]:
        """What `find` looks cells up in, as arguments of an op: tensors, sizes of all levels, and
        for every axis whether it is periodic.
        """
        table = [self._origins, self._steps, self._starts, self._keys, self._corners]
        sizes = list(itertools.chain.from_iterable(self.level_shapes))
        axes = range(len(self.level_shapes[0]))
        return table, sizes, [int(axis in self.periodic_axes) for axis in axes]

    def __repr__(self) -> str:
        return (
            f"CellIndex(points={self.n_points}, cells={self.n_cells}, images={self.batch_size}, "
            f"level_shapes={self.level_shapes}; device={self.device})"
        )


@trainable_tensors()
def index_cells(pyramid: FeaturePyramid) -> CellIndex:
    """Finds the occupied cells once, for all layers that share the points.

    Their number depends on tensor contents, so on a GPU this synchronizes. For meta and fake
    tensors the index has as many cells as points, the most there can be.

    Raises:
        ValueError: ``pyramid`` is not a `FeaturePyramid`, has too many cells for 64-bit keys, or
            has too many occupied cells.
    """
    check_type("pyramid", pyramid, FeaturePyramid)
    dim, device = pyramid.position_dim, pyramid.coordinates.device
    windows = windows_on_axes([_WINDOW] * pyramid.n_levels, dim)
    keys = CellKeys(pyramid.level_shapes, windows, pyramid.batch_size, device)
    levels = torch.arange(pyramid.n_levels, device=device)
    images = torch.arange(max(pyramid.batch_size, 1), device=device)
    zeros = levels.new_zeros(dim)
    origins = keys.of(zeros, levels, images[:, None])
    unit = torch.eye(dim, dtype=torch.int64, device=device)[:, None]
    steps = keys.of(unit, levels, zeros[0]) - keys.of(zeros, levels, zeros[0])

    misplaced = pyramid.misplaced()
    coordinates = pyramid.coordinates.masked_fill(misplaced[:, None], 0)
    point_keys = keys.of(coordinates[:, 1:-1], coordinates[:, -1], coordinates[:, 0])
    # Far below the key of any location.
    point_keys = point_keys.masked_fill(misplaced, -(2**62))
    cells, cell_of_point = _unique(point_keys)
    # To the key of the cell before along an axis: across the seam from cell 0 of a periodic axis.
    step = -steps[:, coordinates[:, -1]]
    for axis in pyramid.periodic_axes:
        size = constant(pyramid.level_shapes, device)[coordinates[:, -1], axis]
        step[axis] *= torch.where(coordinates[:, axis + 1] == 0, 1 - size, 1)
    # All points of a cell write the same values, so their order does not matter.
    step_of_cell = cells.new_zeros(dim, len(cells)).index_copy_(1, cell_of_point, step)
    corners = constant(list(itertools.product((0, 1), repeat=dim)), device)
    firsts = cells + (corners[:, :, None] * step_of_cell).sum(1)
    return CellIndex(
        cell_of_point,
        len(cells),
        pyramid.batch_size,
        pyramid.level_shapes,
        pyramid.periodic_axes,
        coordinates,
        origins,
        steps,
        *_hash(firsts),
    )


def check_cell_index(
    index: CellIndex, pyramid: FeaturePyramid, check_contents: bool | None = None
) -> None:
    """Raises ValueError unless ``index`` was made for the points of ``pyramid``.

    On a GPU only what needs no synchronization is compared, unless ``check_contents`` is True.
    """
    facts = {
        "level_spatial_shapes": (index.level_shapes, pyramid.level_shapes),
        "periodic_axes": (index.periodic_axes, pyramid.periodic_axes),
        "number of images": (index.batch_size, pyramid.batch_size),
        "device": (index.device, pyramid.coordinates.device),
    }
    check_plan_facts(index, facts)
    check_plan_points(index, index._coordinates, pyramid, check_contents)


def _hash(keys: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
    """Starts of the buckets, size of the largest, keys and corners of the table.

    ``keys[c, m]`` ``[2 ** P, M]`` is the key of the entry that has cell ``m`` as its corner ``c``.
    """
    n_corners, n_cells = keys.shape
    unique, entry = _unique(keys)
    if len(unique) >= 2**31:
        refuse("pyramid", "fewer than 2^31 occupied corners", str(len(unique)))
    corners = keys.new_full((n_corners, len(unique)), n_cells)
    corners.scatter_(1, entry, torch.arange(n_cells, device=keys.device).expand_as(keys))
    n_buckets = 1 << (4 * len(unique)).bit_length()
    bucket, order = _bucket(unique, n_buckets).sort(stable=True)
    starts = torch.searchsorted(bucket, torch.arange(n_buckets + 1, device=keys.device))
    largest = int(starts.diff().max()) if has_contents(keys) else 1
    return (
        starts[:-1].int(),
        largest,
        F.pad(unique[order], (0, largest + 1), value=-1),
        F.pad(corners.t()[order].int(), (0, 0, 0, largest + 1), value=n_cells),
    )


def _unique(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ``keys``, and their indices in the shape of ``keys``. Without contents, all count as
    distinct.
    """
    if has_contents(keys):
        unique, index = torch.unique(keys, return_inverse=True)
        return unique, index
    return keys.flatten(), torch.arange(keys.numel(), device=keys.device).view_as(keys)


def _bucket(keys: Tensor, n_buckets: int) -> Tensor:
    bits = n_buckets.bit_length() - 1
    return (keys * _MULTIPLIER >> (64 - bits)) & (n_buckets - 1)
