"""Reference points: several places in its box that an object query attends from."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .._utils.checks import as_list, as_numbers, check_counts, is_real, refuse
from .._utils.modules import Module
from ..nn.initialized import BiasedLinear
from .structures import ObjectQueries, check_object_queries

_EMBEDDING_STD = 0.1  # of the initial embeddings


class ReferencePoints(Module):
    """Several places in its box that an object query attends from.

    A query of Deformable DETR (Zhu et al., 2021) has one reference point, the center of its box.
    Windows around it are to be wide to reach the sides of a large box. Here a query attends from K
    points, which move with its box and grow with it, so that narrow windows see the sides of boxes
    of any size:

    ``out = x + W [attention(x_1) - x_1, ..., attention(x_K) - x_K]``, where ``x_k = x + e_k``, at
    point k. The embedding ``e_k`` tells the query at which of its points it is.

    The cross-attention has K times as many queries. Keys and values are projected once.

    Args:
        embed_dim: width of the embeddings, E.
        position_dim: number of spatial dimensions, P; default 2.
        points: K points, P numbers each, in sizes of the box from its center: -0.5 and 0.5 are its
            sides. None (default): the center and the middles of all 2P sides.

    Raises:
        ValueError: a size is below 1, or ``points`` are not at least one point of P finite numbers.

    Example:
        ```python
        import torch
        from vicinal.detr import ObjectQueries, ReferencePoints

        boxes = torch.tensor([[5.0, 8.0, 4.0, 2.0]])  # rows 3 to 7, columns 7 to 9
        queries = ObjectQueries(
            torch.randn(1, 8), boxes, levels=torch.tensor([0]), offsets=torch.tensor([0, 1])
        )
        placed = ReferencePoints(embed_dim=8).place(queries)
        assert placed.positions.tolist() == [[5, 8], [3, 8], [7, 8], [5, 7], [5, 9]]
        ```
    """

    points: Tensor

    def __init__(
        self,
        embed_dim: int,
        position_dim: int = 2,
        points: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        check_counts(embed_dim=embed_dim, position_dim=position_dim)
        self.embed_dim, self.position_dim = int(embed_dim), int(position_dim)
        table = _sides(self.position_dim) if points is None else points
        self.register_buffer("points", _as_points(table, self.position_dim), persistent=False)
        n_points = self.points.shape[0]
        self.embeddings = nn.Parameter(torch.empty(n_points, self.embed_dim))
        self.join = BiasedLinear(n_points * self.embed_dim, self.embed_dim)
        nn.init.normal_(self.embeddings, std=_EMBEDDING_STD)

    def reset_parameters(self) -> None:
        """Reinitializes all parameters."""
        nn.init.normal_(self.embeddings, std=_EMBEDDING_STD)
        self.join.reset_parameters()

    def place(self, queries: ObjectQueries) -> ObjectQueries:
        """Returns the queries at their reference points, K rows for each, one after another.

        Args:
            queries: N object queries.

        Returns:
            ``N * K`` queries: at the reference points, with the sizes of the boxes, and with the
            embeddings of query and point added. They have no groups.

        Raises:
            ValueError: shapes, dtypes or devices of the queries do not match.
        """
        queries = check_object_queries(queries, self.embed_dim, self.position_dim)
        embeddings, boxes, levels, offsets, _ = queries
        n_points = self.points.shape[0]
        centers, sizes = boxes[:, None].chunk(2, 2)
        centers = centers + self.points.to(boxes.dtype) * sizes
        return ObjectQueries(
            (embeddings[:, None] + self.embeddings.to(embeddings.dtype)).flatten(0, 1),
            torch.cat((centers, sizes.expand_as(centers)), 2).flatten(0, 1),
            levels[:, None].expand(-1, n_points).flatten(),
            offsets * n_points,
        )

    def forward(self, queries: ObjectQueries, attend: Callable[[ObjectQueries], Tensor]) -> Tensor:
        """Attends from all points, and joins what they find.

        Args:
            queries: N object queries.
            attend: maps the queries of `place` to their embeddings after an attention with its
                residual connection, ``[N * K, E]``.

        Returns:
            ``[N, E]``.

        Raises:
            ValueError: shapes, dtypes or devices of the queries do not match.
        """
        placed = self.place(queries)
        found = attend(placed) - placed.embeddings
        width = self.join.in_features
        joined: Tensor = self.join(found.reshape(queries.embeddings.shape[0], width))
        return queries.embeddings + joined


def _sides(position_dim: int) -> list[list[float]]:
    """The center of a box and the middles of its sides."""
    points = [[0.0] * position_dim]
    for axis in range(position_dim):
        for side in (-0.5, 0.5):
            points.append([side if other == axis else 0.0 for other in range(position_dim)])
    return points


def _as_points(points: Sequence[Sequence[float]], position_dim: int) -> Tensor:
    expected = f"at least one point of {position_dim} finite numbers"
    rows = as_list("points", points, expected)
    if not isinstance(rows, Sequence) or not rows or isinstance(rows, str):
        refuse("points", expected, points)
    if any(map(is_real, rows)):  # of which `as_numbers` would make a point
        refuse("points", expected, points)
    return torch.tensor([as_numbers("points", row, position_dim, expected) for row in rows])
