"""Reference points: several positions in its box that an object query attends from."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.checks import as_list, as_numbers, check_counts, check_tensor, is_real, refuse
from .._utils.constants import cached_on_gpu
from .._utils.modules import Module
from ..nn.initialized import BiasedLinear
from ..placement import QueryPlacement
from .structures import ObjectQueries

_EMBEDDING_STD = 0.1  # of the initial embeddings
Positions = tuple[tuple[float, ...], ...]


class ReferencePoints(Module):
    """Several positions in its box that an object query attends from.

    A query of Deformable DETR (Zhu et al., 2021) has one reference point, the center of its box.
    Windows around it must be wide to reach the sides of a large box. Here a query attends from K
    reference points, which move with its box and grow with it, so that narrow windows reach the
    sides of boxes of any size:

    ``out = x + W [attention(x_1) - x_1, ..., attention(x_K) - x_K]``, where ``x_k = x + e_k``
    attends from reference point k, and the attention includes its residual connection. The
    embedding ``e_k`` tells reference points apart. No norm follows, also where the attention has
    ``norm_first=False``.

    The cross-attention has K times as many queries. Keys and values are projected once.

    Args:
        embed_dim: width of the embeddings, E.
        position_dim: number of spatial dimensions, P; default 2.
        relative_positions: the K reference points, P numbers each, in sizes of the box from its
            center: -0.5 and 0.5 are its sides. None (default): the center and the middles of all 2P
            sides.

    Raises:
        ValueError: a size is below 1, or ``relative_positions`` are not at least one position of P
            numbers that are finite in float32.

    Example:
        ```python
        import torch
        from vicinal.detr import ObjectQueries, ReferencePoints

        boxes = torch.tensor([[5.0, 8.0, 4.0, 2.0]])  # rows 3 to 7, columns 7 to 9
        queries = ObjectQueries(
            torch.randn(1, 8), boxes, levels=torch.tensor([0]), offsets=torch.tensor([0, 1])
        )
        placement = ReferencePoints(embed_dim=8).placement(queries)
        assert placement.positions.tolist() == [[5, 8], [3, 8], [7, 8], [5, 7], [5, 9]]
        ```
    """

    def __init__(
        self,
        embed_dim: int,
        position_dim: int = 2,
        relative_positions: Sequence[Sequence[float]] | Tensor | None = None,
    ) -> None:
        super().__init__()
        check_counts(embed_dim=embed_dim, position_dim=position_dim)
        self.embed_dim, self.position_dim = int(embed_dim), int(position_dim)
        given = _sides(self.position_dim) if relative_positions is None else relative_positions
        self.relative_positions = _as_positions(given, self.position_dim)
        n_points = len(self.relative_positions)
        self.embeddings = nn.Parameter(torch.empty(n_points, self.embed_dim))
        self.join = BiasedLinear(n_points * self.embed_dim, self.embed_dim)
        nn.init.normal_(self.embeddings, std=_EMBEDDING_STD)

    def reset_parameters(self) -> None:
        """Reinitializes all parameters."""
        nn.init.normal_(self.embeddings, std=_EMBEDDING_STD)
        self.join.reset_parameters()

    def placement(self, queries: ObjectQueries) -> QueryPlacement:
        """Returns the placement of the reference points, K rows for each query, one after another.

        Args:
            queries: N object queries. Their embeddings are not used.

        Raises:
            ValueError: ``queries.boxes`` is not floating ``[N, 2P]``.
        """
        shape = ("N", 2 * self.position_dim)
        boxes = check_tensor("queries.boxes", queries.boxes, shape, kind="floating")
        positions = _relative_positions(self.relative_positions, boxes.device, boxes.dtype)
        n_points = len(self.relative_positions)
        centers, sizes = boxes[:, None].chunk(2, 2)
        return QueryPlacement(
            (centers + positions * sizes).flatten(0, 1),
            queries.offsets * n_points,
            queries.levels[:, None].expand(-1, n_points).flatten(),
        )

    def embed(self, embeddings: Tensor) -> Tensor:
        """Returns the embeddings of the queries at their reference points.

        Args:
            embeddings: floating ``[N, E]``.

        Returns:
            ``[N * K, E]``, in the order of `placement` and in the dtype of ``embeddings``.

        Raises:
            ValueError: ``embeddings`` is not floating ``[N, E]``.
        """
        embeddings = check_tensor("embeddings", embeddings, ("N", self.embed_dim), kind="floating")
        return (embeddings[:, None] + self.embeddings.to(embeddings.dtype)).flatten(0, 1)

    def forward(self, embeddings: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Attends from all reference points and joins the results.

        Args:
            embeddings: floating ``[N, E]``.
            attend: maps what `embed` returns to the same after an attention with its residual
                connection, ``[N * K, E]``.

        Returns:
            ``[N, E]``.

        Raises:
            ValueError: ``embeddings`` or the result of ``attend`` has another shape.
        """
        embeddings = check_tensor("embeddings", embeddings, ("N", self.embed_dim), kind="floating")
        x = self.embed(embeddings)
        attended = check_tensor("attend(...)", attend(x), tuple(x.shape), kind="floating")
        added = (attended - x).reshape(embeddings.shape[0], self.join.in_features)
        joined: Tensor = self.join(added)
        return embeddings + joined

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, relative_positions={[*map(list, self.relative_positions)]}"


def _sides(position_dim: int) -> list[list[float]]:
    """The center of a box and the middles of its sides."""
    positions = [[0.0] * position_dim]
    for axis in range(position_dim):
        for side in (-0.5, 0.5):
            positions.append([side if other == axis else 0.0 for other in range(position_dim)])
    return positions


def _as_positions(given: Any, position_dim: int) -> Positions:
    name, largest = "relative_positions", torch.finfo(torch.float32).max
    expected = f"at least one position of {position_dim} numbers that are finite in float32"
    rows = as_list(name, given, expected)
    # Of a single number, `as_numbers` would make a position.
    if (
        not isinstance(rows, Sequence)
        or not rows
        or isinstance(rows, str)
        or any(map(is_real, rows))
    ):
        refuse(name, expected, given)
    positions = tuple(as_numbers(name, row, position_dim, expected) for row in rows)
    if any(abs(x) > largest for position in positions for x in position):
        refuse(name, expected, given)
    return positions


@cached_on_gpu
def _relative_positions(positions: Positions, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(positions, dtype=dtype, device=device)
