"""The input of all figures and pages: queries of one image and their attention weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import (
    as_list,
    check_finite,
    check_offsets,
    check_range,
    check_tensor,
    refuse,
)
from ..attention import NeighborhoodWeights
from ..pyramid import FeaturePyramid
from ..window_shapes import WindowsLike, as_windows, check_windows_fit, windows_on_axes
from ..windows import check_position_dtype


@dataclass(frozen=True, eq=False, repr=False)
class AttentionRecord:
    """Attention weights of n queries of one image in one attention module.

    The weights come from ``attention_weights`` of `SparseNeighborhoodAttentionBlock` or
    `SparseDeformableAttention`, or from `neighborhood_attention_weights`, in each case with its
    argument ``queries``. Weights of any other attention work too, if listed point by point. The
    figures show one weight per cell: the sum over the points in that cell.

    Args:
        positions: floating ``[n, P]``, positions of the queries, in cells of the full shape.
        weights: weights of the same n queries. Points are indices into the pyramid.
        neighborhood_sizes: window of each level, as in the plan: an odd width, a tuple of one per
            axis, a `Window`, or 0 for a level that is not attended to. None: no windows are drawn.
        name: name of the module, such as ``"decoder layer 2"``.
        batch_index: image that the queries belong to.
        levels: integer ``[n]``, pyramid level of each query, if the queries are points of the
            pyramid. Give the ``query_level_indices`` that the module was given: windows depend on
            them along causal axes. None: queries have no level.
        boxes: floating ``[n, 2P]``, box of each query as center and size along each axis, in cells
            of the full shape. None: queries have no boxes.
        labels: one text per query. None: queries are named by their number.
        scores: floating ``[n]``, one score per query, shown after its label.

    Raises:
        ValueError: shapes or dtypes are inconsistent, values are not finite, a text has a lone
            surrogate, or ``neighborhood_sizes`` are no windows of P axes.

    Example:
        ```python
        import torch
        from vicinal import NeighborhoodWeights
        from vicinal.visualize import AttentionRecord

        # Two queries, one head: query 0 attends to points 4 and 7, query 1 to point 5.
        weights = NeighborhoodWeights(
            offsets=torch.tensor([0, 2, 3]),
            points=torch.tensor([4, 7, 5]),
            weights=torch.tensor([[0.25], [0.75], [1.0]]),
            background=None,
        )
        positions = torch.tensor([[4.5, 4.5], [10.0, 8.0]])
        record = AttentionRecord(positions, weights, labels=["track", "shower"])
        print(len(record), record.n_heads, record.describe(1))
        ```
    """

    positions: Tensor
    weights: NeighborhoodWeights
    neighborhood_sizes: WindowsLike | None = None
    name: str = "attention"
    batch_index: int = 0
    levels: Tensor | None = None
    boxes: Tensor | None = None
    labels: Sequence[str] | None = None
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        positions = check_tensor("positions", self.positions, ("n", "P"), kind="floating")
        check_finite("positions", positions)
        n, dim = positions.shape
        self._set(positions=positions, weights=self._checked_weights(n))
        if self.neighborhood_sizes is not None:
            self._set(neighborhood_sizes=self._checked_windows(dim))
        if self.levels is not None:
            self._set(levels=check_tensor("levels", self.levels, (n,), kind="integer"))
        for name, value, shape in (
            ("boxes", self.boxes, (n, 2 * dim)),
            ("scores", self.scores, (n,)),
        ):
            if value is not None:
                value = check_tensor(name, value, shape, kind="floating")
                check_finite(name, value if value.dim() == 2 else value[:, None])
                self._set(**{name: value})
        check_text("name", self.name)
        if self.labels is not None:
            if isinstance(self.labels, str) or not all(isinstance(x, str) for x in self.labels):
                refuse("labels", f"{n} texts", self.labels)
            if len(self.labels) != n:
                refuse("labels", f"{n} texts", f"{len(self.labels)} texts")
            for index, label in enumerate(self.labels):
                check_text(f"labels[{index}]", label)

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _checked_weights(self, n: int) -> NeighborhoodWeights:
        """The weights as tensors."""
        if not isinstance(self.weights, NeighborhoodWeights):
            refuse("weights", "NeighborhoodWeights", self.weights)
        offsets, points, weights, background = self.weights
        offsets = check_tensor("weights.offsets", offsets, (n + 1,), kind="integer")
        points = check_tensor("weights.points", points, ("M",), kind="integer")
        shape = (len(points), "H")
        weights = check_tensor("weights.weights", weights, shape, kind="floating")
        check_offsets("weights.offsets", offsets, len(points))
        check_finite("weights.weights", weights)
        if background is not None:
            cells = (n, "L", weights.shape[1])
            background = check_tensor("weights.background", background, cells, kind="floating")
        return NeighborhoodWeights(offsets, points, weights, background)

    def _checked_windows(self, position_dim: int) -> tuple[Any, ...]:
        """``neighborhood_sizes`` as `as_windows` returns them, for as many levels as are given."""
        argument, expected = "neighborhood_sizes", "a sequence of windows, one per level"
        given = as_list(argument, self.neighborhood_sizes, expected)
        if not isinstance(given, Sequence) or isinstance(given, str):
            refuse(argument, expected, given)
        return as_windows(given, len(given), position_dim)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def n_heads(self) -> int:
        """Number of attention heads, H."""
        return self.weights.weights.shape[1]

    def describe(self, query: int) -> str:
        """Name of a query: its label (without labels, its number) and its score, if any."""
        text = f"query {query}" if self.labels is None else self.labels[query]
        return text if self.scores is None else f"{text} {float(self.scores[query]):.2f}"


def check_text(argument: str, value: object) -> None:
    """Raises ValueError unless ``value`` is a text that a file can hold.

    A lone surrogate, half of a character, has no encoding.
    """
    if not isinstance(value, str):
        refuse(argument, "a text", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        refuse(argument, "a text without lone surrogates", f"{value[error.start]!a} in {value!a}")


def check_record(record: AttentionRecord, pyramid: FeaturePyramid) -> None:
    """Checks that a record belongs to the pyramid.

    Raises:
        ValueError: its queries, points, levels or windows are not those of the pyramid, or its
            positions or boxes have too narrow a dtype for the map.
    """
    if not isinstance(pyramid, FeaturePyramid):
        refuse("pyramid", "a FeaturePyramid", pyramid)
    if not isinstance(record, AttentionRecord):
        refuse("record", "an AttentionRecord", record)
    check_tensor("positions", record.positions, (len(record), pyramid.position_dim))
    check_position_dtype("positions", record.positions, pyramid.level_shapes)
    if record.boxes is not None:
        check_position_dtype("boxes", record.boxes, pyramid.level_shapes)
    check_range("batch_index", torch.tensor([record.batch_index]), pyramid.batch_size)
    points = record.weights.points.to(pyramid.coordinates.device)
    check_range("weights.points", points, len(pyramid))
    other_image = pyramid.batch[points] != record.batch_index
    if other_image.any():
        image = int(pyramid.batch[points[other_image][0]])
        expected = f"points of image {record.batch_index}"
        refuse("weights.points", expected, f"a point of image {image}")
    if record.neighborhood_sizes is not None:
        dim = pyramid.position_dim
        windows = as_windows(record.neighborhood_sizes, pyramid.n_levels, dim)
        axes = pyramid.periodic_axes
        check_windows_fit(windows_on_axes(windows, dim), pyramid.level_shapes, axes)
    if record.levels is not None:
        check_range("levels", record.levels, pyramid.n_levels)
    if record.weights.background is not None:
        levels = record.weights.background.shape[1]
        if levels != pyramid.n_levels:
            refuse("weights.background", f"{pyramid.n_levels} levels", f"{levels}")
